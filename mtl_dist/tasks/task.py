"""The contract of a task: its head, its loss as (sum, count), its metrics and what its outputs mean.

A mean over several batches, or over the ranks' parts of one, is right only as sum / count over all of them:
batches hold different numbers of labels. So a loss here never divides; whoever has all the parts does.

    loss = sum of task.loss_sum(...) / sum of task.count(...)      over any set of batches
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.lazy import torch
from mtl_dist.specs import HeadSpec, TaskInfo
from mtl_dist.tasks.loss import Loss, LossSettings
from mtl_dist.tasks.thresholds import Rule

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mtl_dist.tasks.metrics import TaskMetrics

Mode = Literal["max", "min"]


class UserLossSettings(UserDefinedSettings, LossSettings):
    """A loss of the user's; its constructor may ask for `info`, the dataset's facts of the task."""

    part_base = "mtl_dist.tasks.task.Loss"
    provides = ("info",)
    settings_base = LossSettings

    def build(self, info: TaskInfo, where: str) -> Loss:
        return self.make(info=info)


class UserMetricSettings(UserDefinedSettings):
    """A metric of torchmetrics or of the user's; its constructor may ask for `info` as well."""

    part_base = "torchmetrics.Metric"
    provides = ("info",)


class LibraryLossSettings(UserDefinedSettings, LossSettings):
    """A loss of `torch.nn` by its path, such as torch.nn.CrossEntropyLoss, with its arguments.

    It is asked for the loss of each sample (its `reduction` is ours): the mean over all labels of a global
    batch is taken from these.
    """

    part_base = "torch.nn.modules.loss._Loss"
    provides = ("reduction",)

    def build(self, info: TaskInfo, where: str) -> Loss:
        from mtl_dist.tasks.library_losses import build_library_loss  # it needs torch, which settings do not

        if "reduction" not in self.arguments:
            raise UserError(f"{where}.kind: expected a loss with a `reduction`, found none in {self.path}.")
        try:
            module = self.make(reduction="none")
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: expected arguments that fit {self.path}, found: {error}") from error
        return build_library_loss(module, info, where)


USER_LOSS = UserDefined((UserLossSettings, LibraryLossSettings))
UserMetric: TypeAlias = Annotated[UserMetricSettings, UserDefined((UserMetricSettings,), only=True)]
MetricName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]


class CommonTaskSettings(Settings, ABC):
    """What every kind of task has in its settings, and what is known of its metrics before one is computed.

    One class for each kind; that of a user-defined kind is named by `Kind.task_settings`.
    """

    modes: ClassVar[Mapping[str, Mode]]
    """The metrics that it reports, beside its loss, and whether larger or smaller is better."""
    compared: ClassVar[tuple[str, ...]]
    """The metrics that methods are compared by, the main one first; none that is another in other words."""
    learnt_by_heart: ClassVar[tuple[str, float]]
    """A metric, and what it reaches on a small batch that a model has learnt by heart."""
    if_not_learnt: ClassVar[str] = "Look at its labels, loss and head"
    """What to look at where a model does not learn a small batch by heart, and nothing else explains it."""
    noise_factor: ClassVar[float] = 1.0
    """The f of uncertainty weighting, f exp(-s) L + s / 2: 1/2 where the loss is that of Gaussian noise."""

    kind: str
    weight: Annotated[float, Field(ge=0, description="Remove the task to switch it off.")] = 1.0
    """The task's weight in the total loss; the balancing method applies it."""
    optional: bool = False
    """Whether the task is left out where the training data does not know it."""
    metrics: dict[MetricName, UserMetric] = Field(default_factory=dict)
    """More metrics by name, each of the user's or of torchmetrics by its import path."""

    @classmethod
    def compared_modes(cls) -> dict[str, Mode]:
        """The metrics that methods are compared by, the main one first, and which way is better."""
        return {metric: cls.modes[metric] for metric in cls.compared}

    @classmethod
    def has_learnt(cls, value: float) -> bool:
        """Whether a value of the metric of `learnt_by_heart` is as good as is wanted."""
        metric, goal = cls.learnt_by_heart
        return value >= goal if cls.modes[metric] == "max" else value <= goal

    @classmethod
    def suited_to(cls, info: TaskInfo) -> tuple[dict[str, Any], str]:
        """Settings that such labels ask for beside the defaults, and why: for a first recipe."""
        return {}, ""

    @abstractmethod
    def build(self, name: str, info: TaskInfo) -> Task:
        """The task called `name` for a dataset that knows `info` of it.

        Raises:
            UserError: the settings do not fit the dataset.
        """


@dataclass(frozen=True, eq=False)
class Baseline:
    """A constant answer: its name ("majority", "mean"), and one sample's output that gives it: (C,), which
    holds everywhere on a map, or a whole map (C, h, w)."""

    name: str
    output_C: Tensor


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """One thing to learn. Immutable, without trainable state."""

    name: str
    info: TaskInfo
    settings: CommonTaskSettings
    loss: Loss
    chosen: tuple[float, ...] = field(default=(), kw_only=True)
    """The thresholds that a run has chosen on its validation split, where the settings ask for that."""

    temperature: float = field(default=1.0, kw_only=True)
    """What logits are divided by before they are read as probabilities (`temperature.py`)."""

    has_temperature: ClassVar[bool] = False
    """Whether a temperature changes its probabilities; it changes no decision by the task's own threshold."""
    layout: ClassVar[Literal["vector", "map"]] = "vector"
    harmless_target: ClassVar[float] = 0
    answers_pixels: ClassVar[bool] = True
    """Of a map: whether it has an answer for each pixel, and is brought to the image's size for that."""

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        """The numbers of outputs that metrics and predictions can read."""
        return (max(1, len(self.info.classes)),)

    @property
    def head(self) -> HeadSpec:
        """The output that the task asks of the model."""
        return HeadSpec(task=self.name, layout=self.layout, num_outputs=self.loss.num_outputs)

    def count(self, target: Tensor, labelled_B: Tensor, lam_B: Tensor | None = None) -> Tensor:
        """The loss's denominator, from targets alone: float32 scalar.

        Labelled samples, or their class weights, or labelled pixels, as the loss has it; times the samples'
        lambdas where these are given.
        """
        counts_B = self.loss.denominators(self.loss_target(target, labelled_B))
        self._require_one_each("denominators", counts_B, labelled_B)
        counts_B = torch.where(labelled_B, counts_B, 0.0)
        return (counts_B if lam_B is None else lam_B * counts_B).sum(dtype=torch.float32)

    def loss_sum(
        self, output: Tensor, target: Tensor, labelled_B: Tensor, lam_B: Tensor | None = None
    ) -> Tensor:
        """The loss's numerator: float32 scalar, computed in float32 under any autocast.

        A sample without a label adds exactly 0 to value and gradient, whatever its output and target hold.
        With `lam_B` each sample's loss is multiplied by its lambda.
        """
        with torch.autocast(output.device.type, enabled=False):
            safe_target = self.loss_target(target, labelled_B)
            safe_output = self._safe_output(output.float(), safe_target, labelled_B)
            losses_B = self.loss.numerators(safe_output, safe_target)
            self._require_one_each("numerators", losses_B, labelled_B)
            losses_B = torch.where(labelled_B, losses_B, 0.0)
            return (losses_B if lam_B is None else lam_B * losses_B).sum()

    @property
    def reported(self) -> tuple[str, ...]:
        """The metrics of its kind that it reports, with these classes."""
        return tuple(self.settings.modes)

    @property
    def parts(self) -> tuple[str, ...]:
        """What its metrics are also had of, each for itself, by name: its classes."""
        return self.info.classes

    def how_to_read(self) -> dict[str, Any]:
        """What programs of others have to know of the outputs beyond the task's info, as JSON holds it."""
        return {}

    @property
    def wants_positive(self) -> bool:
        """Whether its labels, numbers in a column, have to be positive in every split."""
        return False

    def notes(self) -> list[str]:
        """What is assumed that the settings do not say, for people to read at the start of a run."""
        return []

    @property
    def rule(self) -> Rule | None:
        """By which a threshold is to be chosen on the validation split; None where it is stated."""
        return None

    @property
    def decided_labels(self) -> tuple[str, ...]:
        """The labels, or the positive class, that are decided on by a probability."""
        return ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The probability above which each of these is decided."""
        return ()

    @abstractmethod
    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        """Fresh metrics of this task.

        Without `ranking` those are left out that must keep the scores of every sample (auroc,
        mean_average_precision), and memory is constant: for long passes over large training splits. With
        `choosing` the thresholds are chosen by the task's rule from what is counted.
        """

    @abstractmethod
    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """What the outputs say, per sample, in plain Python and numpy values.

        `threshold` is the probability above which a label of a multilabel task, the positive one of two
        classes, or the foreground of a mask of two, is taken as present; None: the task's own.

        Raises:
            UserError: a threshold not between 0 and 1.
        """

    def example(self) -> tuple[Tensor, Tensor] | None:
        """Outputs and targets of a few made samples, on which losses and metrics by path are tried before
        training; None where a kind has none."""
        return None

    def baseline(self) -> Baseline | None:
        """What is best said of every image without looking at it; None where nothing is defined."""
        return None

    def of_ties(self, supports: Sequence[float], num_samples: float) -> dict[str, float]:
        """The metrics of an order for answers that do not differ, such as the constant one, from how many of
        the samples are of each class; those that are undefined are left out. Nothing in a kind without such.
        """
        return {}

    def sample_losses(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> Tensor:
        """Each sample's own loss, numerator over denominator, float32 (B,); NaN without a label."""
        with torch.autocast(output.device.type, enabled=False):
            safe_target = self.loss_target(target, labelled_B)
            safe_output = self._safe_output(output.float(), safe_target, labelled_B)
            losses_B = self.loss.numerators(safe_output, safe_target).detach().float()
            counts_B = self.loss.denominators(safe_target)
        counted_B = labelled_B & (counts_B > 0)
        return torch.where(counted_B, losses_B / torch.where(counted_B, counts_B, 1.0), math.nan)

    def placed(self, answer: dict[str, Any], target: np.ndarray) -> dict[str, Any]:
        """An answer, of `decode`, in pixels of the image as it came, where it speaks of places; `target` is
        the sample's, or what its kind makes of a view `without_label`."""
        return answer

    def drawn(self, answer: Mapping[str, Any], size: tuple[int, int]) -> Any | None:
        """An answer as a label of an image of `size`, where its kind draws labels; None of others."""
        return None

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """What the label of one sample says of it: its `label`, whether the `answer` is `correct`, its
        `error` or the metrics of its map. `output` and `target` have a batch dimension of 1; a map is in its
        own size.

        Nothing in a kind that does not say.
        """
        return {}

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        """Metrics (R,) of labelled samples that count by R rows of weights, from the `columns` that the
        answers and `judged` make: for intervals. With weights of 1 they are the split's own metrics.

        Without `ranking` those are left out that sort the samples of each class. A metric that columns do not
        determine is not among them.
        """
        return {}

    def map_of(self, answer: Mapping[str, Any]) -> np.ndarray | None:
        """The map in a decoded answer, of the values that its kind has in a batch; None where it has none."""
        return None

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Output and target as user-defined metrics see them."""
        return output, target

    def _require_one_each(self, name: str, values: object, labelled_B: Tensor) -> None:
        """Refuse what a loss of the user's returns, before it is broadcast to something else."""
        if not (isinstance(values, torch.Tensor) and values.shape == labelled_B.shape):
            found = tuple(values.shape) if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
            raise UserError(
                f"tasks.{self.name}.loss: expected {name} of shape {tuple(labelled_B.shape)}, one for each "
                f"sample, found {found}. Correct it in {type(self.loss).__name__}."
            )

    def loss_target(self, target: Tensor, labelled_B: Tensor) -> Tensor:
        """The target as the loss wants it, harmless where the label is missing."""
        return torch.where(_along(labelled_B, target), target, self.harmless_target)

    def _safe_output(self, output: Tensor, safe_target: Tensor, labelled_B: Tensor) -> Tensor:
        """The output as the loss wants it, zero where the label is missing.

        Masking the loss would not do: the gradient of an infinite loss is NaN even when multiplied by 0.
        """
        return torch.where(_along(labelled_B, output), output, 0.0)


NUM_MADE, MADE_SIZE = 12, 8
"""The samples of an example, and the height and width of its maps."""


def made(*shape: int) -> Tensor:
    """Numbers that look like outputs, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tied_auroc(supports: Sequence[float], num_samples: float) -> dict[str, float]:
    """The AUROC of answers that do not differ; nothing where no class occurs beside others."""
    return {"auroc": 0.5} if any(0 < support < num_samples for support in supports) else {}


def _along(labelled_B: Tensor, tensor: Tensor) -> Tensor:
    return labelled_B.view(-1, *[1] * (tensor.dim() - 1))


def require_fit(name: str, kind: str, info: TaskInfo, min_classes: int = 0) -> None:
    """Raise UserError unless the dataset's task `info` is of `kind` and has enough classes."""
    if type(kind_of(info.kind)) is not type(kind_of(kind)):
        raise UserError(
            f"tasks.{name}.kind: expected {info.kind}, as the dataset has it, found {kind}. "
            "Change the kind in the recipe, or prepare the dataset with this kind."
        )
    if len(info.classes) < min_classes:
        raise UserError(
            f"tasks.{name}: expected {min_classes} or more classes in the dataset, found {len(info.classes)}"
            f"{_listed(info.classes)}. Prepare the dataset with all its classes, or remove the task."
        )


def require_threshold(threshold: float) -> None:
    """Raise UserError unless `threshold` is a probability that decides something."""
    if not 0 < threshold < 1:
        raise UserError(
            f"threshold: expected a probability between 0 and 1, found {threshold}. The default is 0.5."
        )


def _listed(classes: tuple[str, ...]) -> str:
    return f" ({', '.join(classes)})" if classes else ""
