"""Vector: K numbers per sample. Target float32 (B, K) in their units, NaN where one is missing; output
(B, K), each standardised by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.config.user_defined import UserDefined
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vector import units_of
from mtl_dist.lazy import torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.number_losses import MseSettings, PointLoss, PointLossChoice
from mtl_dist.tasks.resampling import of_vectors
from mtl_dist.tasks.task import (
    NUM_MADE,
    Baseline,
    CommonTaskSettings,
    Loss,
    Mode,
    Task,
    UserLossSettings,
    made,
    require_fit,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VectorLossChoice: TypeAlias = Annotated[
    PointLossChoice, Field(discriminator="kind"), UserDefined((UserLossSettings,))
]


class VectorSettings(CommonTaskSettings):
    """A task with several numbers per sample; their names are the dataset's."""

    modes: ClassVar[Mapping[str, Mode]] = {"nrmse": "min", "mae": "min", "rmse": "min", "r2": "max"}
    compared: ClassVar[tuple[str, ...]] = ("nrmse", "mae")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("r2", 0.95)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the numbers are those of the images, and at their ranges: "
        "outliers hold the others back under mse"
    )
    noise_factor: ClassVar[float] = 0.5

    kind: Literal["vector"] = "vector"
    loss: VectorLossChoice = MseSettings()
    """The mean over all numbers of all samples that have a label."""
    standardise: bool = True
    """Learn (y - mean) / std of each number, with the training split's mean and std; metrics and predictions
    undo it."""

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info, min_classes=1)
        numbers = kind_of(info.kind).numbers(info).values()
        means = tuple(number.mean for number in numbers)
        scales = tuple(number.std if number.std > 0 else 1.0 for number in numbers)
        loss = self.loss.build(info, f"tasks.{name}.loss")
        of_all = VectorLoss(loss, len(info.classes)) if isinstance(loss, PointLoss) else loss
        return VectorTask(name, info, self, of_all, means, scales)


@dataclass(frozen=True)
class VectorLoss(Loss):
    """A loss of each number that has a label; every one counts alike."""

    of_number: PointLoss
    size: int

    @property
    def num_outputs(self) -> int:
        return self.size

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        there_BK = torch.isfinite(target)
        losses_BK = self.of_number.elements(output, torch.where(there_BK, target, 0.0))
        return torch.where(there_BK, losses_BK, 0.0).sum(dim=1)

    def denominators(self, target: Tensor) -> Tensor:
        return torch.isfinite(target).sum(dim=1, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class VectorTask(Task):
    """Several numbers per sample; `means` and `scales` are those of the training labels, in their units."""

    settings: VectorSettings
    means: tuple[float, ...]
    scales: tuple[float, ...]

    harmless_target: ClassVar[float] = math.nan

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        return (len(self.info.classes),)

    def read(self, output: Tensor) -> Tensor:
        """The numbers that outputs say, in their units, float64 (B, K)."""
        output = output.detach().double()
        if not self.settings.standardise:
            return output
        return output * output.new_tensor(self.scales) + output.new_tensor(self.means)

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.number_metrics import VectorMetrics  # imports torch

        return VectorMetrics(self.read, self.means, self.scales)

    def how_to_read(self) -> dict[str, Any]:
        """The `mean` and `std` of each number by which an output of it is made."""
        if not self.settings.standardise:
            return {"mean": [0.0] * len(self.means), "std": [1.0] * len(self.means)}
        return {"mean": list(self.means), "std": list(self.scales)}

    def example(self) -> tuple[Tensor, Tensor]:
        num = len(self.info.classes)
        target = made(NUM_MADE + 1, num)[1:] * torch.tensor(self.scales) + torch.tensor(self.means)
        target[0, 0] = math.nan
        return made(NUM_MADE, num), target

    def baseline(self) -> Baseline | None:
        """The mean of each number's training labels."""
        if not self.info.num_labelled:
            return None
        zero = self.settings.standardise
        return Baseline("mean", torch.zeros(len(self.means)) if zero else torch.tensor(self.means))

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `values` by name; their `unit` where all have one, else `units` by name."""
        names, units = self.info.classes, units_of(self.info)
        unit: dict[str, Any] = {"unit": units[0]}
        if len(set(units)) > 1:
            unit = {"units": dict(zip(names, units, strict=True))}
        return [
            {"values": dict(zip(names, values, strict=True)), **unit} for values in self.read(output).tolist()
        ]

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """By name the `label` and the `error` of each number in its unit, None without a label; `off`, the
        root of their mean squared error in deviations of the training labels."""
        labels, errors, squares = {}, {}, []
        for name, label, scale in zip(self.info.classes, target[0].tolist(), self.scales, strict=True):
            error = answer["values"][name] - label
            there = math.isfinite(label)
            labels[name], errors[name] = (label, error) if there else (None, None)
            squares += [(error / scale) ** 2] if there else []
        return {"label": labels, "error": errors, "off": math.sqrt(sum(squares) / len(squares))}

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_vectors(columns, weights_RN, dict(zip(self.info.classes, self.scales, strict=True)))

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, K) and targets (B, K) in their units; NaN where a target is missing."""
        return self.read(output).float(), target

    def loss_target(self, target: Tensor, labelled_B: Tensor) -> Tensor:
        safe_BK = super().loss_target(target, labelled_B)
        if not self.settings.standardise:
            return safe_BK
        return (safe_BK - safe_BK.new_tensor(self.means)) / safe_BK.new_tensor(self.scales)

    def _safe_output(self, output: Tensor, safe_target: Tensor, labelled_B: Tensor) -> Tensor:
        """The output, 0 where there is no label."""
        return torch.where(torch.isfinite(safe_target), output, 0.0)
