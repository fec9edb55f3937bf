"""Ordinal: one grade of several in their order. Target int64 (B,), output (B, C - 1): how surely it is beyond
each grade but the last, in the terms of the loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_grades
from mtl_dist.tasks.task import (
    NUM_MADE,
    Baseline,
    CommonTaskSettings,
    Loss,
    LossSettings,
    Mode,
    Task,
    made,
    require_fit,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_SMALLEST = 1e-6


class OrdinalLossSettings(LossSettings):
    """A loss of grades."""

    @abstractmethod
    def build(self, info: TaskInfo, where: str) -> OrdinalLoss: ...


class CornSettings(OrdinalLossSettings):
    """CORN (Shi et al., Deep neural networks for rank-consistent ordinal regression based on conditional
    probabilities, 2021, https://arxiv.org/abs/2111.08851): output k says whether a grade that is k or more is
    beyond k; the mean of the cross entropies over all such questions that a label answers."""

    kind: Literal["corn"] = "corn"

    def build(self, info: TaskInfo, where: str) -> OrdinalLoss:
        return Corn(len(info.classes))


class CumulativeLinkSettings(OrdinalLossSettings):
    """The cumulative logit model (McCullagh, Regression models for ordinal data, 1980): a score against
    ascending thresholds; here an image has its own. The negative log likelihood of the grade."""

    kind: Literal["cumulative_link"] = "cumulative_link"

    def build(self, info: TaskInfo, where: str) -> OrdinalLoss:
        return CumulativeLink(len(info.classes))


OrdinalLossChoice: TypeAlias = Annotated[CornSettings | CumulativeLinkSettings, Field(discriminator="kind")]


class OrdinalSettings(CommonTaskSettings):
    """A task with one grade per sample; number and names of the grades are the dataset's."""

    modes: ClassVar[Mapping[str, Mode]] = {
        "mae": "min",
        "kappa": "max",
        "within_one": "max",
        "accuracy": "max",
    }
    compared: ClassVar[tuple[str, ...]] = ("mae", "kappa")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("accuracy", 0.95)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the grades are those of the images, and whether their order is right"
    )

    kind: Literal["ordinal"] = "ordinal"
    loss: OrdinalLossChoice = CornSettings()

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info, min_classes=2)
        return OrdinalTask(name, info, self, self.loss.build(info, f"tasks.{name}.loss"))


@dataclass(frozen=True)
class OrdinalLoss(Loss):
    """A loss that also says what its outputs mean."""

    num_classes: int

    @property
    def num_outputs(self) -> int:
        return self.num_classes - 1

    @abstractmethod
    def beyond(self, output: Tensor) -> Tensor:
        """The probability that a grade is beyond each one but the last, descending, (B, C - 1)."""

    @abstractmethod
    def outputs_for(self, beyond_K: Tensor) -> Tensor:
        """The outputs that say these probabilities."""


class Corn(OrdinalLoss):
    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        grades_K = torch.arange(self.num_outputs, device=output.device)
        answers_BK = (target[:, None] > grades_K).to(output.dtype)
        losses_BK = F.binary_cross_entropy_with_logits(output, answers_BK, reduction="none")
        return torch.where(target[:, None] >= grades_K, losses_BK, 0.0).sum(dim=1)

    def denominators(self, target: Tensor) -> Tensor:
        return (target + 1).clamp(max=self.num_outputs).float()

    def beyond(self, output: Tensor) -> Tensor:
        return F.logsigmoid(output).cumsum(dim=1).exp()

    def outputs_for(self, beyond_K: Tensor) -> Tensor:
        before_K = torch.cat([beyond_K.new_ones(1), beyond_K[:-1]])
        return torch.logit(beyond_K / before_K, eps=_SMALLEST)


class CumulativeLink(OrdinalLoss):
    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        logits_BK = _descending(output)
        # log(sigmoid(a) - sigmoid(b)) for a > b, without the difference of nearly equal numbers.
        above_BC = F.pad(F.logsigmoid(logits_BK), (1, 0))
        below_BC = F.pad(F.logsigmoid(-logits_BK), (0, 1))
        gaps_BC = F.pad(-torch.expm1(-(F.softplus(output[:, 1:]) + _SMALLEST)), (1, 1), value=1.0).log()
        return -(above_BC + below_BC + gaps_BC).gather(1, target[:, None])[:, 0]

    def denominators(self, target: Tensor) -> Tensor:
        return torch.ones_like(target, dtype=torch.float32)

    def beyond(self, output: Tensor) -> Tensor:
        return _descending(output).sigmoid()

    def outputs_for(self, beyond_K: Tensor) -> Tensor:
        logits_K = torch.logit(beyond_K, eps=_SMALLEST)
        steps_K = (logits_K[:-1] - logits_K[1:]).clamp(min=_SMALLEST)
        return torch.cat([logits_K[:1], torch.expm1(steps_K).log()])


def _descending(output: Tensor) -> Tensor:
    """The log-odds of being beyond each grade: the first output, less a positive step for each other one."""
    steps = F.softplus(output[:, 1:]) + _SMALLEST
    return torch.cat([output[:, :1], output[:, :1] - steps.cumsum(dim=1)], dim=1)


class OrdinalTask(Task):
    """One grade of several in their order."""

    loss: OrdinalLoss

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        return (len(self.info.classes) - 1,)

    def grades(self, output: Tensor) -> Tensor:
        """The median grade of each sample, int64 (B,)."""
        return (self.loss.beyond(output.double()) > 0.5).sum(dim=1)

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.ordinal_metrics import OrdinalMetrics  # imports torch

        return OrdinalMetrics(self.grades, len(self.info.classes))

    def example(self) -> tuple[Tensor, Tensor]:
        num_classes = len(self.info.classes)
        num = max(NUM_MADE, num_classes)
        return made(num, num_classes - 1), torch.arange(num) % num_classes

    def baseline(self) -> Baseline | None:
        """The shares of the training labels: their median grade."""
        if not self.info.is_counted:
            return None
        counts_C = torch.tensor(self.info.class_counts, dtype=torch.float64)
        beyond_K = 1 - counts_C.cumsum(dim=0)[:-1] / counts_C.sum()
        return Baseline("median", self.loss.outputs_for(beyond_K).float())

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the median grade as `class_id` and `class_name`, and all `probabilities`."""
        return [
            {
                "class_id": grade,
                "class_name": self.info.classes[grade],
                "probabilities": dict(zip(self.info.classes, probabilities, strict=True)),
            }
            for grade, probabilities in zip(
                self.grades(output).tolist(), self._probabilities(output).tolist(), strict=True
            )
        ]

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `label`, its `label_id` and `label_probability`, whether the answer is `correct`, and its
        `error` in steps."""
        label = int(target)
        name = self.info.classes[label]
        return {
            "label_id": label,
            "label": name,
            "label_probability": answer["probabilities"][name],
            "correct": answer["class_id"] == label,
            "error": answer["class_id"] - label,
        }

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_grades(columns, weights_RN, len(self.info.classes))

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms of the grades' probabilities (B, C), and the grades."""
        return self._probabilities(output).clamp(min=1e-12).log().float(), target

    def _probabilities(self, output: Tensor) -> Tensor:
        beyond_BK = self.loss.beyond(output.detach().double())
        return F.pad(beyond_BK, (1, 0), value=1.0) - F.pad(beyond_BK, (0, 1))
