"""Regression: one number per sample. Target float32 (B,) in its unit; output (B, num_outputs) of the
loss, in the space in which is learnt: standardised, perhaps logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.number_losses import (
    GaussianNll,
    MseSettings,
    NumberLoss,
    NumberLossChoice,
    Quantiles,
    pinball,
)
from mtl_dist.tasks.resampling import of_deviations, of_errors, of_quantiles
from mtl_dist.tasks.task import (
    NUM_MADE,
    USER_LOSS,
    Baseline,
    CommonTaskSettings,
    Loss,
    Mode,
    Task,
    made,
    require_fit,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

RegressionLoss: TypeAlias = Annotated[NumberLossChoice, Field(discriminator="kind"), USER_LOSS]

FAR = 4
"""Deviations from the mean, beyond which a few labels would lead a squared error."""
_OF_ERRORS = ("mae", "rmse", "mse", "r2")
LIMIT_95 = 1.959963984540054
"""The deviations on both sides of the mean within which 95 % of a normal distribution lie."""
_LARGEST = 700.0
"""The largest number whose exponential is finite in float64, nearly."""


class RegressionSettings(CommonTaskSettings):
    """A task with one number per sample."""

    modes: ClassVar[Mapping[str, Mode]] = {
        "mae": "min",
        "rmse": "min",
        "mse": "min",
        "r2": "max",
        "pinball": "min",
        "nll": "min",
        "coverage_error": "min",
        "interval_width": "min",
        "mean_deviation": "min",
    }
    compared: ClassVar[tuple[str, ...]] = ("mae", "rmse")
    learnt_by_heart: ClassVar[tuple[str, float]] = ("r2", 0.95)
    if_not_learnt: ClassVar[str] = (
        "Look in the picture whether the numbers are those of the images, and at their range: "
        "outliers hold the others back under mse"
    )
    noise_factor: ClassVar[float] = 0.5

    kind: Literal["regression"] = "regression"
    loss: RegressionLoss = MseSettings()
    space: Literal["linear", "log"] = "linear"
    """Learn the numbers, or their logarithms, for labels that are all positive."""
    standardise: bool = True
    """Learn (y - mean) / std with the training split's mean and std (of the logarithms in `space: log`);
    metrics and predictions undo it.

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
        logarithms = self.space == "log"
        if logarithms and info.num_labelled:
            self._require_logarithms(name, info)
        mean, scale = _moments(info, logarithms) if self.standardise else (0.0, 1.0)
        loss = self.loss.build(info, f"tasks.{name}.loss")
        made_by = {Quantiles: QuantileTask, GaussianNll: GaussianTask}.get(type(loss), RegressionTask)
        return made_by(name, info, self, loss, logarithms, mean, scale)

    def _require_logarithms(self, name: str, info: TaskInfo) -> None:
        if info.minimum <= 0:
            raise UserError(
                f"tasks.{name}.space: expected positive labels for log, found {info.minimum:.6g}. Use linear."
            )
        if "log_mean" not in info.facts:
            raise UserError(
                f"tasks.{name}.space: expected a dataset that knows the mean of its labels' logarithms, "
                "found one that was prepared without. Prepare it again, or use linear."
            )


def _moments(info: TaskInfo, logarithms: bool) -> tuple[float, float]:
    """The mean and the deviation of training labels, or of their logarithms; the latter never 0."""
    mean = info.facts.get("log_mean", 0.0) if logarithms else info.mean
    scale = info.facts.get("log_std", 1.0) if logarithms else info.std
    return mean, scale if scale > 0 else 1.0


@dataclass(frozen=True, eq=False)
class RegressionTask(Task):
    """One number per sample; `mean` and `scale` are those of the space in which it is learnt."""

    settings: RegressionSettings
    logarithms: bool
    mean: float
    scale: float

    @property
    def allowed_outputs(self) -> tuple[int, ...]:
        return (self.loss.num_outputs,) if isinstance(self.loss, NumberLoss) else (1,)

    @property
    def reported(self) -> tuple[str, ...]:
        return _OF_ERRORS

    @property
    def wants_positive(self) -> bool:
        return self.logarithms

    # ---- what outputs say
    def values(self, learnt: Tensor) -> Tensor:
        """What numbers of the space in which is learnt are in the unit, float64."""
        values = learnt.detach().double() * self.scale + self.mean
        return values.clamp(max=_LARGEST).exp() if self.logarithms else values

    def read(self, output: Tensor) -> Tensor:
        """The answers of outputs in the unit, float64 (B,)."""
        loss: Loss = self.loss
        return self.values(loss.answers(output) if isinstance(loss, NumberLoss) else output.squeeze(1))

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """Answers minus targets, in the unit, float64 (B,)."""
        return self.read(output) - target.double()

    def learnt(self, target: Tensor) -> Tensor:
        """Targets as they are learnt; NaN of what has no logarithm."""
        if self.logarithms:
            target = torch.where(target > 0, target, torch.nan).log()
        return (target - self.mean) / self.scale

    @property
    def unit_scale(self) -> float:
        """About what numbers of the task are apart, in the unit."""
        return self.info.std if self.info.std > 0 else 1.0

    # ---- as every task
    def how_to_read(self) -> dict[str, Any]:
        """`space`, and the `mean` and `std` by which an output of it is made of a number."""
        return {"space": self.settings.space, "mean": self.mean, "std": self.scale}

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.number_metrics import RegressionMetrics  # imports torch

        return RegressionMetrics(self)

    def example(self) -> tuple[Tensor, Tensor]:
        target = made(NUM_MADE + 1)[1:] * (self.info.std or 1.0) + self.info.mean
        if self.logarithms:
            target = target.abs() + max(self.info.minimum, 1e-6)
        return made(NUM_MADE, self.loss.num_outputs), target

    def baseline(self) -> Baseline | None:
        """The mean of the training labels, of their logarithms in that space; with their deviation, where the
        loss has such outputs, as if they were normally distributed."""
        if not self.info.num_labelled:
            return None
        mean, deviation = _moments(self.info, self.logarithms)
        mean, deviation = (mean - self.mean) / self.scale, deviation / self.scale
        loss: Loss = self.loss
        output_C = loss.outputs_for(mean, deviation) if isinstance(loss, NumberLoss) else torch.tensor([mean])
        return Baseline("geometric mean" if self.logarithms else "mean", output_C)

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `value` in its `unit`."""
        return [{"value": value, "unit": self.info.unit} for value in self.read(output).tolist()]

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
        return self.read(output).float(), target

    def loss_target(self, target: Tensor, labelled_B: Tensor) -> Tensor:
        # Where a label is missing a number that has a logarithm; what comes of it is dropped.
        harmless = 1.0 if self.logarithms else 0.0
        return self.learnt(torch.where(labelled_B, target, harmless))


class QuantileTask(RegressionTask):
    """A number with its quantiles; the median is the answer."""

    loss: Quantiles

    @property
    def reported(self) -> tuple[str, ...]:
        of_intervals = ("coverage_error", "interval_width") if len(self.loss.shares) > 1 else ()
        return (*_OF_ERRORS, "pinball", *of_intervals)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"{share:g}" for share in self.loss.shares)

    def how_to_read(self) -> dict[str, Any]:
        """That it is quantiles, too, in ascending order once they are sorted."""
        return super().how_to_read() | {"quantiles": list(self.loss.shares)}

    def quantiles(self, output: Tensor) -> Tensor:
        """The quantiles in the unit, ascending, float64 (B, Q)."""
        return self.values(self.loss.quantiles(output))

    def pinballs(self, output: Tensor, target: Tensor) -> Tensor:
        """The pinball losses in the unit, float64 (B, Q)."""
        return pinball(self.quantiles(output), target.double(), self.loss.shares)

    def covers(self, values_BQ: Tensor, target: Tensor) -> Tensor:
        """Whether targets lie between their lowest and highest quantile."""
        return (target >= values_BQ[:, 0]) & (target <= values_BQ[:, -1])

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.number_metrics import QuantileMetrics

        return QuantileMetrics(self)

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the median as `value`, the `quantiles` by their shares, and their `unit`."""
        return [
            answer | {"quantiles": dict(zip(self.parts, quantiles, strict=True))}
            for answer, quantiles in zip(super().decode(output), self.quantiles(output).tolist(), strict=True)
        ]

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `label`, the `error`, whether the interval of all quantiles has the label (`covered`), and its
        `width`."""
        quantiles = list(answer["quantiles"].values())
        label = float(target)
        own = {"covered": quantiles[0] <= label <= quantiles[-1], "width": quantiles[-1] - quantiles[0]}
        return super().judged(answer, output, target) | own

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_errors(columns, weights_RN) | of_quantiles(columns, weights_RN, self.loss.shares)


class GaussianTask(RegressionTask):
    """A number with its predicted deviation; in `space: log` a log-normal distribution."""

    loss: GaussianNll

    @property
    def reported(self) -> tuple[str, ...]:
        return (*_OF_ERRORS, "nll", "coverage_error", "mean_deviation")

    def how_to_read(self) -> dict[str, Any]:
        """That the second output makes the deviation, `floor` + log(1 + exp(it)), too."""
        return super().how_to_read() | {"deviation": {"floor": self.loss.floor}}

    def deviations(self, output: Tensor) -> Tensor:
        """The predicted standard deviations in the unit, float64 (B,)."""
        output = output.detach().double()
        learnt_B = self.loss.deviations(output) * self.scale
        if not self.logarithms:
            return learnt_B
        mean_B, variance_B = self.loss.answers(output) * self.scale + self.mean, learnt_B.square()
        # sqrt(exp(v) - 1) exp(m + v / 2), whose factors may be too large where the product is not.
        log_B = mean_B + variance_B + 0.5 * torch.log(-torch.expm1(-variance_B))
        return log_B.clamp(max=_LARGEST).exp()

    def surprise(self, output: Tensor, target: Tensor) -> Tensor:
        """The negative logarithm of the density of each target in its unit, float64 (B,)."""
        target = target.double()
        surprise_B = self.loss.surprise(output.detach().double(), self.learnt(target))
        surprise_B = surprise_B + math.log(self.scale)
        return surprise_B + target.log() if self.logarithms else surprise_B

    def distances(self, output: Tensor, target: Tensor) -> Tensor:
        """Targets minus means, in predicted deviations, in the space in which is learnt; float64 (B,)."""
        output = output.detach().double()
        return (self.learnt(target.double()) - self.loss.answers(output)) / self.loss.deviations(output)

    def covers(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether targets lie in the middle 95 % of their distributions."""
        return self.distances(output, target).abs() <= LIMIT_95

    def metrics(self, ranking: bool = True, choosing: bool = False) -> TaskMetrics:
        from mtl_dist.tasks.number_metrics import GaussianMetrics

        return GaussianMetrics(self)

    def decode(self, output: Tensor, threshold: float | None = None) -> list[dict[str, Any]]:
        """Per sample the `value` and its standard `deviation`, in their `unit`."""
        return [
            {"value": answer["value"], "deviation": deviation, "unit": answer["unit"]}
            for answer, deviation in zip(
                super().decode(output), self.deviations(output).tolist(), strict=True
            )
        ]

    def judged(self, answer: Mapping[str, Any], output: Tensor, target: Tensor) -> dict[str, Any]:
        """The `label`, the `error`, the `nll` of the label, by how many deviations it is off the mean
        (`distance`), and whether that is within the middle 95 % (`covered`)."""
        return super().judged(answer, output, target) | {
            "nll": float(self.surprise(output, target)),
            "distance": float(self.distances(output, target)),
            "covered": bool(self.covers(output, target)),
        }

    def resampled(
        self, columns: Mapping[str, np.ndarray], weights_RN: np.ndarray, ranking: bool = True
    ) -> dict[str, np.ndarray]:
        return of_errors(columns, weights_RN) | of_deviations(columns, weights_RN)
