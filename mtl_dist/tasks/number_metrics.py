"""The metrics of numbers, of their quantiles and of their predicted deviations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.accumulator import Accumulator
from mtl_dist.tasks.class_metrics import summable
from mtl_dist.tasks.number_losses import Quantiles

NOMINAL_95 = 0.95


class OfNumbers(Protocol):
    """A task of numbers, as its metrics ask it."""

    @property
    def name(self) -> str: ...
    @property
    def info(self) -> TaskInfo: ...
    @property
    def logarithms(self) -> bool: ...
    @property
    def unit_scale(self) -> float: ...
    def errors(self, output: Tensor, target: Tensor) -> Tensor: ...


class OfQuantiles(OfNumbers, Protocol):
    """One with quantiles."""

    @property
    def loss(self) -> Quantiles: ...
    def quantiles(self, output: Tensor) -> Tensor: ...
    def pinballs(self, output: Tensor, target: Tensor) -> Tensor: ...
    def covers(self, values_BQ: Tensor, target: Tensor) -> Tensor: ...


class OfDeviations(OfNumbers, Protocol):
    """One with predicted deviations."""

    def deviations(self, output: Tensor) -> Tensor: ...
    def surprise(self, output: Tensor, target: Tensor) -> Tensor: ...
    def covers(self, output: Tensor, target: Tensor) -> Tensor: ...


class RegressionMetrics(Accumulator):
    """Errors in the target's own unit, from float64 sums.

    r2 is 1 - (squared error) / (squared deviation from the mean of the split's targets), NaN where the
    targets do not vary. torchmetrics' own sums targets in float32, which cancels when their mean is far from
    0, and takes every squared error below 1e-4 for none.
    """

    sums: Tensor

    def __init__(self, task: OfNumbers) -> None:
        super().__init__()
        self._task = task
        self.add_sum("sums", torch.zeros(6, dtype=torch.float64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count outputs (B, num_outputs) as they are learnt against targets (B,) in their unit."""
        centred_B = target.double() - self._task.info.mean
        error_B = self._task.errors(output, target)
        refused_B = (target <= 0) & self._task.logarithms
        terms_6B = torch.stack(
            [
                torch.ones_like(error_B),
                error_B.abs(),
                error_B.square(),
                centred_B,
                centred_B.square(),
                refused_B.double(),
            ]
        )
        self.sums += torch.where(labelled_B, terms_6B, 0.0).sum(dim=1)

    def metrics(self) -> dict[str, float]:
        num, absolute, squared, total, total_squared, refused = self.sums.tolist()
        if refused:
            raise UserError(
                f"tasks.{self._task.name}.space: expected positive labels for log, found {refused:.0f} of "
                f"{num:.0f} that are not. Correct these labels, or use linear."
            )
        if num == 0:
            return dict.fromkeys(("mae", "rmse", "mse", "r2"), math.nan) | {"num_samples": 0.0}
        deviation = total_squared - total * total / num
        # What remains below is the rounding of the subtraction, not a deviation.
        varies = num >= 2 and deviation > 1e-12 * total_squared
        return {
            "mae": absolute / num,
            "rmse": math.sqrt(squared / num),
            "mse": squared / num,
            "r2": 1 - squared / deviation if varies else math.nan,
            "num_samples": num,
        }


class QuantileMetrics(RegressionMetrics):
    """What quantiles are worth beside the errors of their median: pinball and widths in the unit, coverage.

    Of each quantile `below` is the share of labels that lie below it, which is to be its own.
    """

    pinballs: Tensor
    below: Tensor
    covered: Tensor
    widths: Tensor

    def __init__(self, task: OfQuantiles) -> None:
        super().__init__(task)
        self._of_quantiles = task
        num_quantiles = len(task.loss.shares)
        self.add_sum("pinballs", torch.zeros(num_quantiles, dtype=torch.float64))
        self.add_sum("below", torch.zeros(num_quantiles, dtype=torch.int64))
        self.add_sum("covered", torch.zeros((), dtype=torch.int64))
        self.add_sum("widths", torch.zeros((), dtype=torch.float64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        super().count(output, target, labelled_B)
        task = self._of_quantiles
        values_BQ = task.quantiles(output)
        pinballs_BQ = summable(task.pinballs(output, target) / task.unit_scale)
        self.pinballs += torch.where(labelled_B[:, None], pinballs_BQ, 0.0).sum(dim=0)
        self.below += ((target[:, None] < values_BQ) & labelled_B[:, None]).sum(dim=0)
        self.covered += (task.covers(values_BQ, target) & labelled_B).sum()
        widths_B = summable((values_BQ[:, -1] - values_BQ[:, 0]) / task.unit_scale)
        self.widths += torch.where(labelled_B, widths_B, 0.0).sum()

    def metrics(self) -> dict[str, float]:
        values = super().metrics()
        num = values.pop("num_samples")
        task = self._of_quantiles
        pinballs_Q = _over(self.pinballs, num) * task.unit_scale
        below_Q = _over(self.below, num)
        self._per_class = [
            {"pinball": pinball, "below": below}
            for pinball, below in zip(pinballs_Q.tolist(), below_Q.tolist(), strict=True)
        ]
        values["pinball"] = float(pinballs_Q.mean())
        if len(task.loss.shares) > 1:
            values |= _covered(float(_over(self.covered, num)), task.loss.nominal)
            values["interval_width"] = float(_over(self.widths, num)) * task.unit_scale
        return values | {"num_samples": num}


class GaussianMetrics(RegressionMetrics):
    """What predicted deviations are worth beside the errors: the likelihood of the labels, and how many of
    them lie in the middle 95 % of their distributions."""

    surprise: Tensor
    covered: Tensor
    widths: Tensor

    def __init__(self, task: OfDeviations) -> None:
        super().__init__(task)
        self._of_deviations = task
        self.add_sum("surprise", torch.zeros((), dtype=torch.float64))
        self.add_sum("covered", torch.zeros((), dtype=torch.int64))
        self.add_sum("widths", torch.zeros((), dtype=torch.float64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        super().count(output, target, labelled_B)
        task = self._of_deviations
        surprise_B = summable(task.surprise(output, target))
        self.surprise += torch.where(labelled_B, surprise_B, 0.0).sum()
        self.covered += (task.covers(output, target) & labelled_B).sum()
        deviations_B = summable(task.deviations(output) / task.unit_scale)
        self.widths += torch.where(labelled_B, deviations_B, 0.0).sum()

    def metrics(self) -> dict[str, float]:
        values = super().metrics()
        num = values.pop("num_samples")
        values["nll"] = float(_over(self.surprise, num))
        values |= _covered(float(_over(self.covered, num)), NOMINAL_95)
        values["mean_deviation"] = float(_over(self.widths, num)) * self._of_deviations.unit_scale
        return values | {"num_samples": num}


class VectorMetrics(Accumulator):
    """Errors of several numbers: of each in its own unit, and the means of these over the numbers.

    nrmse is the root mean squared error in deviations of the training labels, so that numbers of different
    units have a mean. A number without a label in the split is left out.
    """

    sums: Tensor
    num_samples: Tensor

    def __init__(
        self, read: Callable[[Tensor], Tensor], means: Sequence[float], scales: Sequence[float]
    ) -> None:
        super().__init__()
        self._read = read
        self._means, self._scales = tuple(means), tuple(scales)
        self.add_sum("sums", torch.zeros(5, len(self._means), dtype=torch.float64))
        self.add_sum("num_samples", torch.zeros((), dtype=torch.int64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count outputs (B, K) as they are learnt against targets (B, K) in their units."""
        target = target.double()
        there_BK = target.isfinite() & labelled_B[:, None]
        error_BK = self._read(output) - target
        centred_BK = target - target.new_tensor(self._means)
        terms_5BK = torch.stack(
            [
                torch.ones_like(error_BK),
                error_BK.abs(),
                error_BK.square(),
                centred_BK,
                centred_BK.square(),
            ]
        )
        self.sums += torch.where(there_BK, terms_5BK, 0.0).sum(dim=1)
        self.num_samples += labelled_B.sum()

    def metrics(self) -> dict[str, float]:
        self._per_class = [
            _of_number(sums, scale) for sums, scale in zip(self.sums.T.tolist(), self._scales, strict=True)
        ]
        means = {
            name: _mean([row[name] for row in self._per_class]) for name in ("nrmse", "mae", "rmse", "r2")
        }
        return means | {"num_samples": float(self.num_samples)}


def _of_number(sums: Sequence[float], scale: float) -> dict[str, float]:
    num, absolute, squared, total, total_squared = sums
    if not num:
        return dict.fromkeys(("nrmse", "mae", "rmse", "r2"), math.nan) | {"support": 0.0}
    deviation = total_squared - total * total / num
    varies = num >= 2 and deviation > 1e-12 * total_squared
    rmse = math.sqrt(squared / num)
    return {
        "nrmse": rmse / scale,
        "mae": absolute / num,
        "rmse": rmse,
        "r2": 1 - squared / deviation if varies else math.nan,
        "support": num,
    }


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _covered(share: float, nominal: float) -> dict[str, float]:
    """How many labels lie in their intervals, and how far that is from what was to be."""
    return {"coverage": share, "coverage_error": abs(share - nominal)}


def _over(sums: Tensor, num: float) -> Tensor:
    return sums.double() / num if num else torch.full_like(sums, math.nan, dtype=torch.float64)
