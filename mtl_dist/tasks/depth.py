"""Depth and other dense numbers: a number per pixel. Target float32 (B, H, W) in its unit, NaN where there is
none; output (B, 1, h, w) in the space in which it is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.depth_losses import DepthL1Settings, DepthLoss, DepthLossSettings
from mtl_dist.tasks.maps import resized
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_pixels
from mtl_dist.tasks.task import (
    MADE_SIZE,
    NUM_MADE,
    Baseline,
    CommonTaskSettings,
    Mode,
    Task,
    made,
    require_fit,
)

if TYPE_CHECKING:
    from torch import Tensor


class DepthSettings(CommonTaskSettings):
    """A task with a number per pixel."""

    modes: ClassVar[Mapping[str, Mode]] = {
        "mae": "min",
        "rmse": "min",
        "r2": "max",
        "abs_rel": "min",
        "sq_rel": "min",
        "rmse_log": "min",
        "log10": "min",
        "silog": "min",
        "delta1": "max",
        "delta2": "max",
        "delta3": "max",
    }
    compared: ClassVar[tuple[str, ...]] = ("mae", "abs_rel")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("r2", 0.9)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether near and far lie where they should, and at unit, valid "
        "range and log space"
    )
    noise_factor: ClassVar[float] = 0.5

    kind: Literal["depth"] = "depth"
    loss: DepthLoss = DepthL1Settings()
    space: Literal["linear", "log"] = "linear"
    """Learn the values, or their logarithms; then values that are not positive have none."""
    standardise: bool = True
    """Learn (y - mean) / std with the training split's mean and std over its pixels (of the logarithms in
    `space: log`); metrics and predictions undo it."""

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info)
        logarithms = self.space == "log"
        if logarithms and info.num_labelled and not info.facts.get("positive"):
            raise UserError(f"tasks.{name}.space: expected positive values for log, found none. Use linear.")
        if isinstance(self.loss, DepthLossSettings) and self.loss.logarithms and not logarithms:
            raise UserError(
                f"tasks.{name}.space: expected log for the loss {self.loss.kind}, found {self.space}. "
                "Set it, or take another loss."
            )
        mean = info.facts.get("log_mean", 0.0) if logarithms else info.mean
        scale = info.facts.get("log_std", 1.0) if logarithms else info.std
        if not self.standardise:
            mean, scale = 0.0, 1.0
        loss = self.loss.build(replace(info, mean=mean, std=scale), f"tasks.{name}.loss")
        return DepthTask(name, info, self, loss, logarithms, mean, scale)


@dataclass(frozen=True, eq=False)
class DepthTask(Task):
    """A number per pixel; `mean` and `scale` are those of the space in which it is learnt."""

    logarithms: bool
    mean: float
    scale: float

    layout: ClassVar[Literal["vector", "map"]] = "map"
    harmless_target: ClassVar[float] = math.nan

    def read(self, output: Tensor) -> Tensor:
        """What the outputs (B, 1, H, W) say in the task's unit, float64 (B, H, W)."""
        learnt_BHW = output.detach()[:, 0].double() * self.scale + self.mean
        return learnt_BHW.exp() if self.logarithms else learnt_BHW

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.dense_metrics import DepthMetrics  # imports torch

        return DepthMetrics(self.read, self.info)

    def example(self) -> tuple[Tensor, Tensor]:
        shape = (NUM_MADE, MADE_SIZE, MADE_SIZE)
        target = (made(*shape).abs() + 0.5) * (self.info.std or 1.0) + max(self.info.minimum, 0.0)
        target[:, 0, 0] = math.nan
        return made(NUM_MADE, 1, MADE_SIZE, MADE_SIZE), target

    def baseline(self) -> Baseline | None:
        """The mean of the training pixels; of their logarithms in that space."""
        if not self.info.num_labelled:
            return None
        mean = self.info.facts.get("log_mean", 0.0) if self.logarithms else self.info.mean
        return Baseline("mean", torch.tensor([(mean - self.mean) / self.scale]))

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `map` (float32, H x W) in its `unit`, and its `mean`, `minimum` and `maximum`.

        Maps have the output's resolution; resize the output (`maps.resized`) for another.
        """
        return [
            {
                "map": values_HW.float().numpy(),
                "mean": float(values_HW.mean()),
                "minimum": float(values_HW.min()),
                "maximum": float(values_HW.max()),
                "unit": self.info.unit,
            }
            for values_HW in self.read(output).cpu()
        ]

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The metrics of this map alone, and the `pixels` and `positive_pixels` that they are over."""
        from mtl_dist.tasks.dense_metrics import DepthMetrics

        values = DepthMetrics(self.read, self.info).to(output.device).of_one(output, target)
        own = {name: values[name] for name in ("mae", "rmse", "abs_rel", "delta1")}
        return own | {"pixels": int(target.isfinite().sum()), "positive_pixels": int((target > 0).sum())}

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_pixels(columns, ["mae"], "pixels", weights_RN) | of_pixels(
            columns, ["abs_rel", "delta1"], "positive_pixels", weights_RN
        )

    def map_of(self, answer: Mapping[str, Any]) -> np.ndarray | None:
        """The map, in the unit."""
        values: np.ndarray = answer["map"]
        return values

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Values and targets (B, H, W) in the unit, at the target's resolution; NaN where there is none."""
        return self.read(resized(output, target.shape[-2:])).float(), target

    def loss_target(self, target: Tensor, labelled_B: Tensor) -> Tensor:
        values_BHW = super().loss_target(target, labelled_B)
        if self.logarithms:
            values_BHW = torch.where(values_BHW > 0, values_BHW, math.nan).log()
        return (values_BHW - self.mean) / self.scale

    def _safe_output(self, output: Tensor, safe_target: Tensor, labelled_B: Tensor) -> Tensor:
        """The output at the target's resolution, 0 at pixels without a value."""
        valid_B1HW = torch.isfinite(safe_target)[:, None]
        return torch.where(valid_B1HW, resized(output, safe_target.shape[-2:]), 0.0)
