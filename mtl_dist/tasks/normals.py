"""Surface normals: a direction per pixel. Target float32 (B, 3, H, W) of unit length, NaN where there is
none; output (B, 3, h, w) of any length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field

from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.maps import resized
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_pixels
from mtl_dist.tasks.task import (
    MADE_SIZE,
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
)

if TYPE_CHECKING:
    from torch import Tensor

_SHORTEST = 1e-6


class CosineSettings(LossSettings):
    """1 minus the cosine of the angle."""

    kind: Literal["cosine"] = "cosine"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Cosine()


class NormalsL1Settings(LossSettings):
    """The sum of the absolute differences of x, y and z, between unit vectors."""

    kind: Literal["l1"] = "l1"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return NormalsL1()


class AngularSettings(LossSettings):
    """The angle, in radians."""

    kind: Literal["angular"] = "angular"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Angular()


NormalsLoss: TypeAlias = Annotated[
    CosineSettings | NormalsL1Settings | AngularSettings, Field(discriminator="kind"), USER_LOSS
]


class NormalsSettings(CommonTaskSettings):
    """A task with a direction per pixel."""

    modes: ClassVar[Mapping[str, Mode]] = {
        "mean_angle": "min",
        "median_angle": "min",
        "within_11_25": "max",
        "within_22_5": "max",
        "within_30": "max",
    }
    compared: ClassVar[tuple[str, ...]] = ("mean_angle", "within_11_25")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("within_22_5", 0.9)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the colours fit the surfaces, and at the sign convention of the axes"
    )

    kind: Literal["normals"] = "normals"
    loss: NormalsLoss = CosineSettings()

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info)
        return NormalsTask(name, info, self, self.loss.build(info, f"tasks.{name}.loss"))


@dataclass(frozen=True)
class VectorLoss(Loss):
    """A loss of the unit vector of each pixel that has one, averaged over those."""

    @property
    def num_outputs(self) -> int:
        return 3

    def pixels(self, units_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """The loss of each pixel, (B, H, W)."""
        raise NotImplementedError

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        valid_BHW = torch.isfinite(target).all(dim=1)
        target = torch.where(valid_BHW[:, None], target, 0.0)
        losses_BHW = self.pixels(F.normalize(output, dim=1, eps=_SHORTEST), target)
        return torch.where(valid_BHW, losses_BHW, 0.0).sum(dim=(1, 2))

    def denominators(self, target: Tensor) -> Tensor:
        return torch.isfinite(target).all(dim=1).sum(dim=(1, 2), dtype=torch.float32)


class Cosine(VectorLoss):
    def pixels(self, units_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        return 1 - (units_B3HW * target_B3HW).sum(dim=1)


class NormalsL1(VectorLoss):
    def pixels(self, units_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        return (units_B3HW - target_B3HW).abs().sum(dim=1)


class Angular(VectorLoss):
    def pixels(self, units_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        # The arccosine has no slope at 0 and 180 degrees; this has one everywhere but exactly there.
        cross_BHW = torch.linalg.cross(units_B3HW, target_B3HW, dim=1).square().sum(dim=1)
        return torch.atan2((cross_BHW + _SHORTEST**2).sqrt(), (units_B3HW * target_B3HW).sum(dim=1))


class NormalsTask(Task):
    """A direction per pixel."""

    layout: ClassVar[Literal["vector", "map"]] = "map"
    harmless_target: ClassVar[float] = math.nan

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        return (3,)

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.dense_metrics import NormalsMetrics  # imports torch

        return NormalsMetrics()

    def example(self) -> tuple[Tensor, Tensor]:
        shape = (NUM_MADE, 3, MADE_SIZE, MADE_SIZE)
        target = F.normalize(made(*shape).roll(1, dims=0), dim=1)
        target[:, :, 0, 0] = math.nan
        return made(*shape), target

    def baseline(self) -> Baseline | None:
        """The mean of the training vectors."""
        if not self.info.facts.get("pixels"):
            return None
        return Baseline("mean", torch.tensor(self.info.facts["mean"]))

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `normals` (float32, 3 x H x W) and their `mean`, both of unit length.

        Maps have the output's resolution; resize the output (`maps.resized`) for another.
        """
        units_B3HW = F.normalize(output.detach().float(), dim=1, eps=_SHORTEST).cpu()
        means_B3 = F.normalize(units_B3HW.double().mean(dim=(2, 3)), dim=1)
        return [
            {"normals": units_3HW.numpy(), "mean": mean_3.tolist()}
            for units_3HW, mean_3 in zip(units_B3HW, means_B3, strict=True)
        ]

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The metrics of this map alone, and the `pixels` that they are over."""
        from mtl_dist.tasks.dense_metrics import NormalsMetrics

        values = NormalsMetrics().to(output.device).of_one(output, target)
        own = {name: values[name] for name in self.settings.modes}
        return own | {"pixels": int(target.isfinite().all(dim=1).sum())}

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        names = ["mean_angle", "within_11_25", "within_22_5", "within_30"]
        return of_pixels(columns, names, "pixels", weights_RN)

    def map_of(self, answer: Mapping[str, Any]) -> np.ndarray | None:
        """The unit vectors (3, H, W)."""
        normals: np.ndarray = answer["normals"]
        return normals

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, 3, H, W) at the target's resolution, and the targets; NaN where there is none."""
        return F.normalize(resized(output, target.shape[-2:]), dim=1, eps=_SHORTEST), target

    def _safe_output(self, output: Tensor, safe_target: Tensor, labelled_B: Tensor) -> Tensor:
        """The output at the target's resolution, a constant at pixels without a direction."""
        valid_B3HW = torch.isfinite(safe_target)
        return torch.where(valid_B3HW, resized(output, safe_target.shape[-2:]), 1.0)
