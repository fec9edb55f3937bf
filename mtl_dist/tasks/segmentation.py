"""Segmentation: a class per pixel. Target uint8 (B, H, W), 255 = ignore; output logits (B, C, h, w).

Class 0 is the background. A head at another resolution than the mask is fine: its logits are upsampled.

Of two classes, `cross_entropy` asks for two outputs, every other loss for one, the log-odds of the
foreground. Metrics and predictions read either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mtl_dist.lazy import torch
from mtl_dist.specs import IGNORE, TaskInfo
from mtl_dist.tasks.maps import foreground_logits, predicted_classes, resized
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_overlaps
from mtl_dist.tasks.segmentation_losses import MapCrossEntropySettings, SegmentationLoss
from mtl_dist.tasks.task import (
    MADE_SIZE,
    NUM_MADE,
    Baseline,
    CommonTaskSettings,
    Mode,
    Task,
    made,
    require_fit,
    require_threshold,
)
from mtl_dist.tasks.thresholds import DEFAULT

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class SegmentationSettings(CommonTaskSettings):
    """A task with a class per pixel; number and names of the classes are the dataset's."""

    modes: ClassVar[Mapping[str, Mode]] = {"dice": "max", "iou": "max", "pixel_accuracy": "max"}
    compared: ClassVar[tuple[str, ...]] = ("iou", "pixel_accuracy")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("dice", 0.9)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether masks lie on their objects, and at the head's stride and "
        "the decoder: small objects want a finer map"
    )

    kind: Literal["segmentation"] = "segmentation"
    loss: SegmentationLoss = MapCrossEntropySettings()

    @classmethod
    def suited_to(cls, info: TaskInfo) -> tuple[dict[str, Any], str]:
        if len(info.classes) != 2 or not sum(info.class_counts):
            return {}, ""
        share = info.class_counts[1] / sum(info.class_counts)
        why = f"Dice counts the overlap: {info.classes[1]} is {share:.1%} of the pixels"
        return {"loss": {"kind": "bce_dice"}}, why

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info, min_classes=2)
        return SegmentationTask(name, info, self, self.loss.build(info, f"tasks.{name}.loss"))


class SegmentationTask(Task):
    """A class per pixel."""

    layout: ClassVar[Literal["vector", "map"]] = "map"
    harmless_target: ClassVar[float] = IGNORE

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        num_classes = len(self.info.classes)
        return (num_classes, 1) if num_classes == 2 else (num_classes,)

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.class_metrics import SegmentationMetrics  # imports torch

        return SegmentationMetrics(len(self.info.classes))

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `mask` (uint8, H x W, class indices) and the `area_ratio` of its foreground.

        Two classes add the foreground's `probability` (float32, H x W); more add the `area_ratios` by class.
        Masks have the output's resolution; resize the output (`maps.resized`) for another.
        """
        threshold = DEFAULT if threshold is None else threshold
        require_threshold(threshold)
        logits_BCHW = output.detach().float()
        masks_BHW = predicted_classes(logits_BCHW, threshold).to(torch.uint8).cpu()
        decoded: list[dict[str, Any]] = [
            {"mask": mask_HW.numpy(), "area_ratio": float((mask_HW > 0).double().mean())}
            for mask_HW in masks_BHW
        ]
        if len(self.info.classes) == 2:
            for sample, probability_HW in zip(
                decoded, foreground_logits(logits_BCHW).sigmoid().cpu(), strict=True
            ):
                sample["probability"] = probability_HW.numpy()
        else:
            for sample, mask_HW in zip(decoded, masks_BHW, strict=True):
                pixels_C = torch.bincount(mask_HW.flatten(), minlength=len(self.info.classes))
                ratios_C = (pixels_C / mask_HW.numel()).tolist()
                sample["area_ratios"] = dict(zip(self.info.classes, ratios_C, strict=True))
        return decoded

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `dice`, `iou` and `pixel_accuracy` of this mask alone, as the split's are defined, and by class
        the pixels that are right (`hits`), true and predicted, from which these are."""
        from mtl_dist.tasks.class_metrics import SegmentationMetrics

        metrics = SegmentationMetrics(len(self.info.classes)).to(output.device)
        values = metrics.of_one(output, target)
        counts_CC = metrics.confusion.cpu()
        margins = {"hits": counts_CC.diagonal(), "true": counts_CC.sum(1), "predicted": counts_CC.sum(0)}
        named = {
            key: dict(zip(self.info.classes, counts.tolist(), strict=True)) for key, counts in margins.items()
        }
        return {name: values[name] for name in self.settings.modes} | {"pixels": named}

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_overlaps(columns, self.info.classes, weights_RN)

    def example(self) -> tuple[Tensor, Tensor]:
        size, num_classes = (MADE_SIZE, MADE_SIZE), len(self.info.classes)
        target = (torch.arange(NUM_MADE * MADE_SIZE**2) % num_classes).view(NUM_MADE, *size).to(torch.uint8)
        target[:, 0, 0] = IGNORE
        return made(NUM_MADE, self.loss.num_outputs, *size), target

    def baseline(self) -> Baseline | None:
        """The most frequent class of a pixel, in every pixel."""
        if not self.info.is_counted or not sum(self.info.class_counts):
            return None
        scores_C = torch.tensor(self.info.class_counts).clamp(min=1e-6).log()
        if self.loss.num_outputs == 1:
            scores_C = scores_C[1:] - scores_C[:1]
        return Baseline("majority", scores_C)

    def map_of(self, answer: Mapping[str, Any]) -> np.ndarray | None:
        """The mask, of class indices."""
        mask: np.ndarray = answer["mask"]
        return mask

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C, H, W) at the mask's resolution and classes int64 (B, H, W), 255 = ignore."""
        return resized(output, target.shape[-2:]), target.long()

    def _safe_output(self, output: Tensor, safe_target: Tensor, labelled_B: Tensor) -> Tensor:
        """The logits at the mask's resolution, zero at pixels without a label."""
        valid_B1HW = (safe_target != IGNORE)[:, None]
        return torch.where(valid_B1HW, resized(output, safe_target.shape[-2:]), 0.0)
