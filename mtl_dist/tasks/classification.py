"""Classification: one class per sample. Target int64 (B,), output logits (B, C)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.task import (
    USER_LOSS,
    Baseline,
    CommonTaskSettings,
    Loss,
    LossSettings,
    Mode,
    Task,
    require_fit,
)
from mtl_dist.tasks.weights import ClassWeights, class_weights

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropySettings(LossSettings):
    """Cross entropy of the softmax, as `torch.nn.CrossEntropyLoss` has it."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    class_weights: ClassWeights = None

    def build(self, info: TaskInfo, where: str) -> Loss:
        weights_C = class_weights(self.class_weights, info, f"{where}.class_weights")
        return CrossEntropy(len(info.classes), weights_C, self.label_smoothing)


class FocalSettings(LossSettings):
    """Focal loss, -w_y (1 - p_y)^gamma log p_y: samples that are right with confidence count little.

    https://arxiv.org/abs/1708.02002. The paper divides by the number of positive anchors; here, as in
    weighted cross entropy, by the sum of the class weights w_y (the paper's alpha), so gamma 0 is cross
    entropy.
    """

    kind: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0)] = 2.0
    class_weights: ClassWeights = None

    def build(self, info: TaskInfo, where: str) -> Loss:
        weights_C = class_weights(self.class_weights, info, f"{where}.class_weights")
        return Focal(len(info.classes), weights_C, self.gamma)


ClassificationLoss: TypeAlias = Annotated[
    CrossEntropySettings | FocalSettings, Field(discriminator="kind"), USER_LOSS
]


class ClassificationSettings(CommonTaskSettings):
    """A task with one class per sample; number and names of the classes are the dataset's."""

    modes: ClassVar[Mapping[str, Mode]] = {
        "accuracy": "max",
        "balanced_accuracy": "max",
        "precision": "max",
        "recall": "max",
        "f1": "max",
        "auroc": "max",
    }
    compared: ClassVar[tuple[str, ...]] = ("accuracy", "balanced_accuracy", "f1", "auroc")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("accuracy", 0.99)

    kind: Literal["classification"] = "classification"
    loss: ClassificationLoss = CrossEntropySettings()

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info, min_classes=2)
        return ClassificationTask(name, info, self, self.loss.build(info, f"tasks.{name}.loss"))


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

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
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

    def metrics(self, ranking: bool = True) -> TaskMetrics:
        from mtl_dist.tasks.accumulators import ClassificationMetrics  # torchmetrics is slow to import

        return ClassificationMetrics(len(self.info.classes), ranking)

    def baseline(self) -> Baseline | None:
        """The most frequent class; the scores are the logarithms of the classes' shares."""
        if not self.info.num_labelled:
            return None
        return Baseline("majority", torch.tensor(self.info.class_counts).clamp(min=1e-6).log())

    def decode(self, output: Tensor, threshold: float = 0.5) -> list[dict[str, Any]]:
        """Per sample `class_id`, `class_name`, its probability as `confidence`, and all `probabilities`."""
        decoded = []
        for probabilities in output.detach().float().softmax(dim=1).tolist():
            class_id = max(range(len(probabilities)), key=probabilities.__getitem__)
            decoded.append(
                {
                    "class_id": class_id,
                    "class_name": self.info.classes[class_id],
                    "confidence": probabilities[class_id],
                    "probabilities": dict(zip(self.info.classes, probabilities, strict=True)),
                }
            )
        return decoded
