"""Losses of numbers, in the space in which they are learnt: standardised, perhaps logarithms.

a point       mse, l1, smooth_l1, huber: one output, the answer
quantiles     an output for each
a deviation   gaussian_nll: the mean of a normal distribution, and what its deviation is made of
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.loss import Loss, LossSettings

if TYPE_CHECKING:
    from torch import Tensor

MEDIAN = 0.5
_SMALLEST = 1e-6
_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)

Positive = Annotated[float, Field(gt=0)]


class NumberLossSettings(LossSettings):
    """A loss of numbers."""

    @abstractmethod
    def build(self, info: TaskInfo, where: str) -> NumberLoss: ...


class PointLossSettings(NumberLossSettings):
    """A loss of one answer against one number."""

    @abstractmethod
    def build(self, info: TaskInfo, where: str) -> PointLoss: ...


class MseSettings(PointLossSettings):
    """Squared error."""

    kind: Literal["mse"] = "mse"

    def build(self, info: TaskInfo, where: str) -> PointLoss:
        return Mse()


class L1Settings(PointLossSettings):
    """Absolute error."""

    kind: Literal["l1"] = "l1"

    def build(self, info: TaskInfo, where: str) -> PointLoss:
        return L1()


class SmoothL1Settings(PointLossSettings):
    """Squared error up to `beta`, absolute beyond, as `torch.nn.SmoothL1Loss` has it."""

    kind: Literal["smooth_l1"] = "smooth_l1"
    beta: Positive = 1.0
    """Where it turns, in standard deviations of the target (in its unit with `standardise: false`)."""

    def build(self, info: TaskInfo, where: str) -> PointLoss:
        return SmoothL1(self.beta)


class HuberSettings(PointLossSettings):
    """Half the squared error up to `delta`, straight beyond, as `torch.nn.HuberLoss` has it (Huber, Robust
    estimation of a location parameter, 1964): `delta` times the smooth_l1 of that beta."""

    kind: Literal["huber"] = "huber"
    delta: Positive = 1.0
    """Where it turns, in standard deviations of the target (in its unit with `standardise: false`)."""

    def build(self, info: TaskInfo, where: str) -> PointLoss:
        return Huber(self.delta)


def _ascending(quantiles: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in pairwise(quantiles)) or MEDIAN not in quantiles:
        raise ValueError(
            "expected ascending shares between 0 and 1, 0.5 (the answer) among them, found "
            f"{list(quantiles)}. Example: [0.05, 0.5, 0.95]."
        )
    return quantiles


class QuantileSettings(NumberLossSettings):
    """The pinball loss (Koenker and Bassett, Regression quantiles, 1978, https://doi.org/10.2307/1913643),
    averaged over the quantiles; an output for each, put in order where they are read (Chernozhukov et al.,
    Quantile and probability curves without crossing, 2010, https://arxiv.org/abs/0704.3649)."""

    kind: Literal["quantile"] = "quantile"
    quantiles: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1), AfterValidator(_ascending)
    ] = (0.05, MEDIAN, 0.95)
    """The shares of labels that are to lie below the answers; 0.5 is the value."""

    def build(self, info: TaskInfo, where: str) -> Quantiles:
        return Quantiles(self.quantiles)


class GaussianNllSettings(NumberLossSettings):
    """The negative log likelihood of a normal distribution whose mean and deviation are both predicted (Nix
    and Weigend, Estimating the mean and variance of the target probability distribution, 1994,
    https://doi.org/10.1109/ICNN.1994.374138), above the smallest there is: a loss is never negative."""

    kind: Literal["gaussian_nll"] = "gaussian_nll"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weighs a sample's loss by its predicted deviation to the power of twice this, through which no gradient
    goes (Seitzer et al., On the pitfalls of heteroscedastic uncertainty estimation, 2022,
    https://arxiv.org/abs/2203.09168): with 0.5 samples that are badly predicted are not given up."""
    floor: Positive = 1e-3
    """The smallest deviation, in those of the target (in its unit with `standardise: false`)."""

    def build(self, info: TaskInfo, where: str) -> GaussianNll:
        return GaussianNll(self.beta, self.floor)


PointLossChoice: TypeAlias = MseSettings | L1Settings | SmoothL1Settings | HuberSettings
NumberLossChoice: TypeAlias = PointLossChoice | QuantileSettings | GaussianNllSettings


class NumberLoss(Loss):
    """A loss that also says what its outputs (B, num_outputs) mean, in the space in which is learnt."""

    def denominators(self, target: Tensor) -> Tensor:
        return torch.ones_like(target)

    @abstractmethod
    def answers(self, output: Tensor) -> Tensor:
        """The answer of each sample, (B,)."""

    @abstractmethod
    def outputs_for(self, mean: float, deviation: float) -> Tensor:
        """The outputs that say a normal distribution, or its middle."""


@dataclass(frozen=True)
class PointLoss(NumberLoss):
    """A loss of one answer against one number."""

    @property
    def num_outputs(self) -> int:
        return 1

    @abstractmethod
    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each number, of tensors of one shape; 0 of two that are equal."""

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return self.elements(output.squeeze(1), target)

    def answers(self, output: Tensor) -> Tensor:
        return output.squeeze(1)

    def outputs_for(self, mean: float, deviation: float) -> Tensor:
        return torch.tensor([mean])


class Mse(PointLoss):
    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target, reduction="none")


class L1(PointLoss):
    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(output, target, reduction="none")


@dataclass(frozen=True)
class SmoothL1(PointLoss):
    beta: float

    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(output, target, reduction="none", beta=self.beta)


@dataclass(frozen=True)
class Huber(PointLoss):
    delta: float

    def elements(self, output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target, reduction="none", delta=self.delta)


@dataclass(frozen=True)
class Quantiles(NumberLoss):
    """The pinball loss; `shares` are those of labels below each output, ascending."""

    shares: tuple[float, ...]

    @property
    def num_outputs(self) -> int:
        return len(self.shares)

    @property
    def nominal(self) -> float:
        """The share of labels that is to lie between the lowest and the highest quantile."""
        return self.shares[-1] - self.shares[0]

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return pinball(output, target, self.shares).mean(dim=1)

    def quantiles(self, output: Tensor) -> Tensor:
        """The quantiles (B, Q), ascending whatever the outputs are."""
        return output.sort(dim=1).values

    def answers(self, output: Tensor) -> Tensor:
        return self.quantiles(output)[:, self.shares.index(MEDIAN)]

    def outputs_for(self, mean: float, deviation: float) -> Tensor:
        normal = NormalDist()
        return torch.tensor([mean + deviation * normal.inv_cdf(share) for share in self.shares])


def pinball(answers_BQ: Tensor, target_B: Tensor, shares: Sequence[float]) -> Tensor:
    """The pinball loss of each sample and quantile, (B, Q)."""
    shares_Q = torch.tensor(shares, dtype=answers_BQ.dtype, device=answers_BQ.device)
    errors_BQ = target_B[:, None] - answers_BQ
    return torch.maximum(shares_Q * errors_BQ, (shares_Q - 1) * errors_BQ)


@dataclass(frozen=True)
class GaussianNll(NumberLoss):
    """Of the outputs the first is the mean, and the second through softplus, above `floor`, the deviation.

    The loss is by how much the negative log likelihood is above the smallest there is: never negative, as
    methods of balancing want it.
    """

    beta: float
    floor: float

    @property
    def num_outputs(self) -> int:
        return 2

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        losses_B = self._surprise(output, target, math.log(self.floor))
        return losses_B * self.deviations(output.detach()) ** (2 * self.beta) if self.beta else losses_B

    def surprise(self, output: Tensor, target: Tensor) -> Tensor:
        """The negative logarithm of the density of each target, (B,)."""
        return self._surprise(output, target, -_HALF_LOG_2_PI)

    def _surprise(self, output: Tensor, target: Tensor, less: float) -> Tensor:
        deviations_B = self.deviations(output)
        scaled_B = (target - output[:, 0]) / deviations_B
        return deviations_B.log() - less + 0.5 * scaled_B.square()

    def deviations(self, output: Tensor) -> Tensor:
        """The predicted deviation of each sample, (B,)."""
        return self.floor + F.softplus(output[:, 1])

    def answers(self, output: Tensor) -> Tensor:
        return output[:, 0]

    def outputs_for(self, mean: float, deviation: float) -> Tensor:
        return torch.tensor([mean, math.log(math.expm1(max(deviation - self.floor, _SMALLEST)))])
