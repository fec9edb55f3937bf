"""Regression: one number per sample. Target float32 (B,) in its unit, output (B, 1) standardised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.resampling import of_errors
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
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class MseSettings(LossSettings):
    """Squared error."""

    kind: Literal["mse"] = "mse"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Mse()


class L1Settings(LossSettings):
    """Absolute error."""

    kind: Literal["l1"] = "l1"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return L1()


class SmoothL1Settings(LossSettings):
    """Squared error up to `beta`, absolute beyond, as `torch.nn.SmoothL1Loss` has it."""

    kind: Literal["smooth_l1"] = "smooth_l1"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Where it turns, in standard deviations of the target (in its unit with `standardise: false`)."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return SmoothL1(self.beta)


RegressionLoss: TypeAlias = Annotated[
    MseSettings | L1Settings | SmoothL1Settings, Field(discriminator="kind"), USER_LOSS
]


FAR = 4
"""Deviations from the mean, beyond which a few labels would lead a squared error."""


class RegressionSettings(CommonTaskSettings):
    """A task with one number per sample."""

    modes: ClassVar[Mapping[str, Mode]] = {"mae": "min", "rmse": "min", "mse": "min", "r2": "max"}
    compared: ClassVar[tuple[str, ...]] = ("mae", "rmse")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("r2", 0.95)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the numbers are those of the images, and at their range: "
        "outliers hold the others back under mse"
    )
    noise_factor: ClassVar[float] = 0.5

    kind: Literal["regression"] = "regression"
    loss: RegressionLoss = MseSettings()
    standardise: bool = True
    """Learn (y - mean) / std with the training split's mean and std; metrics and predictions undo it.

    A target that is always the same (std 0) is shifted by its mean and not scaled.
    """

    @classmethod
    def suited_to(cls, info: TaskInfo) -> tuple[dict[str, Any], str]:
        farthest = max(info.maximum - info.mean, info.mean - info.minimum) / info.std
        if farthest < FAR:
            return {}, ""
        why = f"errors of outliers count less: the farthest label is {farthest:.1f} deviations from the mean"
        return {"loss": {"kind": "smooth_l1"}}, why

    def build(self, name: str, info: TaskInfo) -> Task:
        require_fit(name, self.kind, info)
        return RegressionTask(name, info, self, self.loss.build(info, f"tasks.{name}.loss"))


@dataclass(frozen=True)
class ElementwiseLoss(Loss):
    """A loss of one number against one number."""

    @property
    def num_outputs(self) -> int:
        return 1

    def denominators(self, target: Tensor) -> Tensor:
        return torch.ones_like(target)


class Mse(ElementwiseLoss):
    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.squeeze(1), target, reduction="none")


class L1(ElementwiseLoss):
    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(output.squeeze(1), target, reduction="none")


@dataclass(frozen=True)
class SmoothL1(ElementwiseLoss):
    beta: float

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(output.squeeze(1), target, reduction="none", beta=self.beta)


class RegressionTask(Task):
    """One number per sample."""

    settings: RegressionSettings

    @property
    def mean(self) -> float:
        """What is taken from a target before it is learnt, in its unit."""
        return self.info.mean if self.settings.standardise else 0.0

    @property
    def scale(self) -> float:
        """What a target is divided by before it is learnt, in its unit."""
        return self.info.std if self.settings.standardise and self.info.std > 0 else 1.0

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.accumulators import RegressionMetrics  # torchmetrics is slow to import

        return RegressionMetrics(self.mean, self.scale)

    def example(self) -> tuple[Tensor, Tensor]:
        return made(NUM_MADE, 1), made(NUM_MADE + 1)[1:] * (self.info.std or 1.0) + self.info.mean

    def baseline(self) -> Baseline | None:
        """The mean of the training labels."""
        if not self.info.num_labelled:
            return None
        return Baseline("mean", torch.tensor([(self.info.mean - self.mean) / self.scale]))

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `value` in its `unit`."""
        values_B = output.detach().double().squeeze(1) * self.scale + self.mean
        return [{"value": value, "unit": self.info.unit} for value in values_B.tolist()]

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `label` and the `error` of the answer, both in the unit."""
        label = float(target)
        return {"label": label, "error": answer["value"] - label}

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_errors(columns, weights_RN)

    def metric_inputs(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B,) and targets (B,) in the target's unit."""
        return output.float().squeeze(1) * self.scale + self.mean, target

    def loss_target(self, target: Tensor, labelled_B: Tensor) -> Tensor:
        return (super().loss_target(target, labelled_B) - self.mean) / self.scale
