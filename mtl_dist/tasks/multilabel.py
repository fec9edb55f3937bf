"""Multilabel: any number of labels per sample. Target float32 (B, C) of 0 and 1, output logits (B, C)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_labels
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
from mtl_dist.tasks.thresholds import DEFAULT, Rule, Threshold, log_odds
from mtl_dist.tasks.weights import PositiveWeights, positive_weights

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class MultilabelBceSettings(LossSettings):
    """Binary cross entropy, averaged over the labels, as `torch.nn.BCEWithLogitsLoss` has it."""

    kind: Literal["bce"] = "bce"
    pos_weight: PositiveWeights = None
    """What a positive of each label weighs against a negative."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return MultilabelBce(
            len(info.classes), positive_weights(self.pos_weight, info, f"{where}.pos_weight")
        )


class MultilabelSettings(CommonTaskSettings):
    """A task with any number of labels per sample; their number and names are the dataset's."""

    modes: ClassVar[Mapping[str, Mode]] = {
        "accuracy": "max",
        "macro_precision": "max",
        "macro_recall": "max",
        "macro_f1": "max",
        "micro_precision": "max",
        "micro_recall": "max",
        "micro_f1": "max",
        "auroc": "max",
        "mean_average_precision": "max",
        "ece": "min",
        "brier": "min",
    }
    compared: ClassVar[tuple[str, ...]] = ("mean_average_precision", "macro_f1", "auroc")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("macro_f1", 0.95)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the labels are those of the images, and at the weights of its classes"
    )

    kind: Literal["multilabel"] = "multilabel"
    loss: Annotated[MultilabelBceSettings, USER_LOSS] = MultilabelBceSettings()
    threshold: Threshold = DEFAULT
    """The probability above which a label is decided; best_f1 or youden: chosen on val, for each label."""

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info, min_classes=1)
        return MultilabelTask(name, info, self, self.loss.build(info, f"tasks.{name}.loss"))


@dataclass(frozen=True, eq=False)
class MultilabelBce(Loss):
    num_classes: int
    pos_weights_C: Tensor | None

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        weights_C = self.pos_weights_C
        if weights_C is not None:
            weights_C = weights_C.to(output.device, non_blocking=True)
        losses_BC = F.binary_cross_entropy_with_logits(output, target, pos_weight=weights_C, reduction="none")
        return losses_BC.mean(dim=1)

    def denominators(self, target: Tensor) -> Tensor:
        return torch.ones_like(target[:, 0])


class MultilabelTask(Task):
    """Any number of labels per sample."""

    settings: MultilabelSettings
    has_temperature = True

    @property
    def rule(self) -> Rule | None:
        return self.settings.threshold if isinstance(self.settings.threshold, str) else None

    @property
    def decided_labels(self) -> tuple[str, ...]:
        return self.info.classes

    @property
    def thresholds(self) -> tuple[float, ...]:
        stated = self.settings.threshold
        return self.chosen or (DEFAULT if isinstance(stated, str) else stated,) * len(self.info.classes)

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.class_metrics import MultilabelMetrics  # imports torch

        return MultilabelMetrics(self.thresholds, ranking, self.rule if choosing and ranking else None)

    def example(self) -> tuple[Tensor, Tensor]:
        output = made(NUM_MADE, len(self.info.classes))
        return output, (output.roll(1, dims=0) > 0).float()

    def baseline(self) -> Baseline | None:
        """Of each class what holds for most samples; the scores are the log-odds of its share."""
        if not self.info.is_counted:
            return None
        shares_C = torch.tensor(self.info.class_counts, dtype=torch.float64) / self.info.num_labelled
        return Baseline("majority", torch.logit(shares_C, eps=1e-6).float())

    def of_ties(self, supports: Sequence[float], num_samples: float) -> dict[str, float]:
        """The average precision of a label is its share of the samples."""
        precisions = [support / num_samples for support in supports if support > 0]
        mean = {"mean_average_precision": sum(precisions) / len(precisions)} if precisions else {}
        return tied_auroc(supports, num_samples) | mean

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the names above the threshold as `labels`, and all `probabilities`."""
        if threshold is not None:
            require_threshold(threshold)
        decoded = []
        limits = [log_odds(own if threshold is None else threshold) for own in self.thresholds]
        for logits_C in output.detach().double():
            scaled_C = logits_C / self.temperature
            named = dict(zip(self.info.classes, scaled_C.float().sigmoid().tolist(), strict=True))
            scores_C = logits_C if threshold is None else scaled_C
            above = zip(self.info.classes, scores_C.tolist(), limits, strict=True)
            labels = [name for name, score, limit in above if score > limit]
            decoded.append({"labels": labels, "probabilities": named})
        return decoded

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `label` as names, whether the answer has just these (`correct`), and of each class whether it
        is true and whether it was decided (`truths`, `decided`)."""
        truths = dict(zip(self.info.classes, (target[0] > 0.5).tolist(), strict=True))
        label = [name for name, true in truths.items() if true]
        decided = {name: name in answer["labels"] for name in self.info.classes}
        return {"label": label, "correct": truths == decided, "truths": truths, "decided": decided}

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_labels(columns, self.info.classes, weights_RN, ranking)
