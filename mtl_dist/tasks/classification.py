"""Classification: one class per sample. Target int64 (B,), output logits (B, C)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.config.errors import suggest
from mtl_dist.errors import UserError
from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_classes, of_confidences, of_scores
from mtl_dist.tasks.task import (
    NUM_MADE,
    USER_LOSS,
    Baseline,
    CommonTaskSettings,
    Loss,
    LossSettings,
    Mode,
    Task,
    made,
    require_fit,
    require_threshold,
    tied_auroc,
)
from mtl_dist.tasks.thresholds import DEFAULT, Decision, Rule, Threshold
from mtl_dist.tasks.weights import Beta, ClassWeights, LogitAdjustment, adjustments, class_weights

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


EFFECTIVE_BETA = 0.999


class CrossEntropySettings(LossSettings):
    """Cross entropy of the softmax, as `torch.nn.CrossEntropyLoss` has it.

    With `logit_adjustment` the classes' log-priors are added to the logits, in the loss alone: rare classes
    are asked for a larger margin, and the balanced error is learnt (https://arxiv.org/abs/2007.07314).
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of a label that is divided among all classes."""
    class_weights: ClassWeights = None
    """What a sample of each class weighs: a number for each, balanced (by 1 / their number of samples), or
    effective (by their effective number, https://arxiv.org/abs/1901.05555); null: all the same."""
    beta: Beta = None
    """Of class_weights: effective; null: 0.999."""
    logit_adjustment: LogitAdjustment = False
    """true, or tau, the factor of the log-priors."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        weights_C = class_weights(self.class_weights, info, where, self.beta, EFFECTIVE_BETA)
        added_C = adjustments(self.logit_adjustment, info, f"{where}.logit_adjustment")
        return CrossEntropy(len(info.classes), weights_C, self.label_smoothing, added_C)


class FocalSettings(LossSettings):
    """Focal loss, -w_y (1 - p_y)^gamma log p_y: samples that are right with confidence count little.

    https://arxiv.org/abs/1708.02002. The paper divides by the number of positive anchors; here, as in
    weighted cross entropy, by the sum of the class weights w_y (the paper's alpha), so gamma 0 is cross
    entropy.
    """

    kind: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0)] = 2.0
    class_weights: ClassWeights = None
    """What a sample of each class weighs: a number for each, balanced (by 1 / their number of samples), or
    effective (by their effective number, https://arxiv.org/abs/1901.05555); null: all the same."""
    beta: Beta = None
    """Of class_weights: effective, which make it the class-balanced focal loss; null: 0.999."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        weights_C = class_weights(self.class_weights, info, where, self.beta, EFFECTIVE_BETA)
        return Focal(len(info.classes), weights_C, self.gamma)


ClassificationLoss: TypeAlias = Annotated[
    CrossEntropySettings | FocalSettings, Field(discriminator="kind"), USER_LOSS
]


MUCH_LARGER = 3
"""A class with so many times the labels of another is one that a model learns first."""
MANY_CLASSES, TOP_K = 10, 5
"""Of more classes than this the accuracy of the likeliest few is measured, unasked; and of how many."""


class ClassificationSettings(CommonTaskSettings):
    """A task with one class per sample; number and names of the classes are the dataset's."""

    modes: ClassVar[Mapping[str, Mode]] = {
        "accuracy": "max",
        "balanced_accuracy": "max",
        "precision": "max",
        "recall": "max",
        "specificity": "max",
        "f1": "max",
        "auroc": "max",
        "average_precision": "max",
        "macro_precision": "max",
        "macro_recall": "max",
        "macro_f1": "max",
        "micro_precision": "max",
        "micro_recall": "max",
        "micro_f1": "max",
        "top_k_accuracy": "max",
        "ece": "min",
        "brier": "min",
    }
    compared: ClassVar[tuple[str, ...]] = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("accuracy", 0.99)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the labels are those of the images, and at loss, class_weights and head"
    )

    kind: Literal["classification"] = "classification"
    loss: ClassificationLoss = CrossEntropySettings()
    positive: str | None = None
    """Of two classes the one that precision, recall, specificity, f1 and average_precision are of; null: the
    second."""
    threshold: Threshold = DEFAULT
    """Of two classes the probability above which it is the positive one; best_f1 or youden: chosen on val."""
    top_k: Annotated[int, Field(ge=2)] | None = None
    """For top_k_accuracy: a label among the k likeliest classes is right; null: 5 of more than 10 classes."""

    @classmethod
    def suited_to(cls, info: TaskInfo) -> tuple[dict[str, Any], str]:
        counts = [count for count in info.class_counts if count]
        if not counts or max(counts) < MUCH_LARGER * min(counts):
            return {}, ""
        largest = info.classes[info.class_counts.index(max(counts))]
        smallest = info.classes[info.class_counts.index(min(counts))]
        why = f"every class weighs the same: {largest} has {max(counts):,} labels, {smallest} {min(counts):,}"
        return {"loss": {"kind": "cross_entropy", "class_weights": "balanced"}}, why

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info, min_classes=2)
        where = f"tasks.{name}"
        if self.positive is not None and self.positive not in info.classes:
            raise UserError(
                f"{where}.positive: expected one of the classes, found {self.positive!r}. "
                f"{suggest(self.positive, info.classes)}"
            )
        for setting, stated in (("positive", self.positive is not None), ("threshold", self.decides)):
            if stated and len(info.classes) != 2:
                raise UserError(
                    f"{where}.{setting}: expected a task of two classes, found one of {len(info.classes)}. "
                    "Remove it: of several classes the likeliest is decided on."
                )
        if self.top_k is not None and self.top_k >= len(info.classes):
            raise UserError(
                f"{where}.top_k: expected fewer than the {len(info.classes)} classes, found {self.top_k}, of "
                "which every label is one. Lower it, or remove it."
            )
        return ClassificationTask(name, info, self, self.loss.build(info, f"tasks.{name}.loss"))

    @property
    def decides(self) -> bool:
        """Whether the threshold is another than that of the likelier class."""
        return self.threshold != DEFAULT


@dataclass(frozen=True, eq=False)
class ClassWeighted(Loss):
    """A loss over classes that counts a sample by the weight of its class, or by 1 without weights."""

    num_classes: int
    weights_C: Tensor | None

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def denominators(self, target: Tensor) -> Tensor:
        if self.weights_C is None:
            return torch.ones_like(target, dtype=torch.float32)
        return self.weights_C.to(target.device, non_blocking=True)[target]


@dataclass(frozen=True, eq=False)
class CrossEntropy(ClassWeighted):
    label_smoothing: float
    added_C: Tensor | None = None

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        if self.added_C is not None:
            output = output + self.added_C.to(output.device, non_blocking=True)
        weights_C = None if self.weights_C is None else self.weights_C.to(output.device, non_blocking=True)
        return F.cross_entropy(
            output, target, weights_C, reduction="none", label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True, eq=False)
class Focal(ClassWeighted):
    gamma: float

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        log_p_B = output.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
        # 1 - p without cancellation, and off 0, where the power's gradient is infinite for gamma < 1.
        wrong_B = (-torch.expm1(log_p_B)).clamp(min=1e-12)
        return -self.denominators(target) * wrong_B**self.gamma * log_p_B


class ClassificationTask(Task):
    """One class per sample."""

    settings: ClassificationSettings
    has_temperature = True

    @property
    def positive(self) -> int | None:
        """The index of the positive class; None where there are more than two."""
        if len(self.info.classes) != 2:
            return None
        return 1 if self.settings.positive is None else self.info.classes.index(self.settings.positive)

    @property
    def reported(self) -> tuple[str, ...]:
        of_two: tuple[str, ...] = ("precision", "recall", "specificity", "f1", "average_precision")
        left_out: tuple[str, ...] = () if self.positive is not None else of_two
        if self.top_k is None:
            left_out += ("top_k_accuracy",)
        return tuple(name for name in super().reported if name not in left_out)

    @property
    def top_k(self) -> int | None:
        """The k of top_k_accuracy; None where it is not measured."""
        if self.settings.top_k is None and len(self.info.classes) > MANY_CLASSES:
            return TOP_K
        return self.settings.top_k

    def notes(self) -> list[str]:
        """That the positive class was not stated."""
        if self.positive is None or self.settings.positive is not None:
            return []
        first, second = self.info.classes
        return [f"the positive class is {second}, the second; positive: {first} makes it the other"]

    def decision(self, threshold: float | None = None) -> Decision:
        """How a class is decided, above its own threshold where none is given."""
        if self.positive is None:
            return Decision(len(self.info.classes))
        return Decision(2, self.positive, self.thresholds[0] if threshold is None else threshold)

    @property
    def rule(self) -> Rule | None:
        return self.settings.threshold if isinstance(self.settings.threshold, str) else None

    @property
    def decided_labels(self) -> tuple[str, ...]:
        return () if self.positive is None else (self.info.classes[self.positive],)

    @property
    def thresholds(self) -> tuple[float, ...]:
        if self.positive is None:
            return ()
        stated = self.settings.threshold
        return self.chosen or (DEFAULT if isinstance(stated, str) else stated,)

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.class_metrics import ClassificationMetrics  # imports torch

        rule = self.rule if choosing and ranking else None
        return ClassificationMetrics(self.decision(), ranking, rule, self.top_k)

    def example(self) -> tuple[Tensor, Tensor]:
        num_classes = len(self.info.classes)
        num = max(NUM_MADE, num_classes)
        return made(num, num_classes), torch.arange(num) % num_classes

    def baseline(self) -> Baseline | None:
        """The most frequent class; the scores are the logarithms of the classes' shares."""
        if not self.info.is_counted:
            return None
        return Baseline("majority", torch.tensor(self.info.class_counts).clamp(min=1e-6).log())

    def of_ties(self, supports: Sequence[float], num_samples: float) -> dict[str, float]:
        """The average precision of the positive class is its share of the samples."""
        share = 0.0 if self.positive is None else supports[self.positive] / num_samples
        return tied_auroc(supports, num_samples) | ({"average_precision": share} if share else {})

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample `class_id`, `class_name`, its probability as `confidence`, and all `probabilities`."""
        if threshold is not None:
            require_threshold(threshold)
        decoded = []
        scaled = output.detach().float() / self.temperature
        probabilities_BC = scaled.softmax(dim=1).tolist()
        decided_B = self.decision(threshold).classes(output if threshold is None else scaled).tolist()
        for probabilities, class_id in zip(probabilities_BC, decided_B, strict=True):
            decoded.append(
                {
                    "class_id": class_id,
                    "class_name": self.info.classes[class_id],
                    "confidence": probabilities[class_id],
                    "probabilities": dict(zip(self.info.classes, probabilities, strict=True)),
                }
            )
        return decoded

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `label`, its `label_id`, the `label_probability`, and whether the answer is `correct`."""
        label = int(target)
        name = self.info.classes[label]
        return {
            "label_id": label,
            "label": name,
            "label_probability": answer["probabilities"][name],
            "correct": answer["class_id"] == label,
        }

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        metrics = of_classes(columns, weights_RN, len(self.info.classes), self.positive)
        if ranking:
            metrics |= of_scores(columns, self.info.classes, weights_RN, self.positive)
        return metrics | of_confidences(columns, self.info.classes, weights_RN, self.top_k)
