"""Fair resource allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import angles, power_balance
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class FairGrad(GradientMethod):
    """An alpha-fair sharing of the update among the tasks (https://arxiv.org/abs/2402.15638).

        G a = a^(-1 / alpha),    a > 0,    w = a

    alpha = 1 is Nash-MTL without its bound on the length.

    Where we differ: Newton's method to the solution, instead of SciPy's least squares. A task without
    gradient has weight 0.

    `balance: {method: fairgrad, alpha: 1.0}`; 1 is proportional fairness, more looks at the worst task.
    """

    method: Literal["fairgrad"] = "fairgrad"
    alpha: float = Field(default=1.0, gt=0)

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        power = 1 / self.alpha
        found = angles(problem.gramian_TT)
        alive_T = found.lengths_T > 0
        weights_T = torch.zeros_like(found.lengths_T)
        if alive_T.any():
            # With a = x / length and lengths relative to their geometric mean m:
            # C x = length^(p - 1) x^-p, and a grows by m^(-2 / (1 + p)).
            mean = found.lengths_T[alive_T].log().mean().exp()
            lengths_T = found.lengths_T[alive_T] / mean
            share_T = power_balance(found.cosines_TT[alive_T][:, alive_T], lengths_T.pow(power - 1), power)
            weights_T[alive_T] = share_T / lengths_T * mean.pow(-2 / (1 + power))
        return weights_T
