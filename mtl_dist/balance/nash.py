"""Nash bargaining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import angles, power_balance
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Nash(GradientMethod):
    """The bargain that maximises the product of all tasks' gains (Nash-MTL, https://arxiv.org/abs/2202.01017).

        G a = 1 / a,    a > 0,    then w = a min(1, max_norm / |sum_k a_k g_k|)

    Where we differ: Newton's method on the convex function behind it (1/2 a^T G a - sum log a), to the
    solution, instead of a sequence of cvxpy programs; it has no memory. Since a^T G a = T, the update's
    length before the bound is always sqrt(T). A task without gradient has weight 0.

    `balance: {method: nash, max_norm: 1.0}`; `max_norm` bounds the length of the update's shared part.
    """

    method: Literal["nash"] = "nash"
    max_norm: float = Field(default=1.0, gt=0)

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        alive_T = found.lengths_T > 0
        num_alive = int(alive_T.sum())
        weights_T = torch.zeros_like(found.lengths_T)
        if num_alive:
            ones_T = torch.ones(num_alive, dtype=weights_T.dtype)
            bargain_T = power_balance(found.cosines_TT[alive_T][:, alive_T], ones_T, 1.0)
            weights_T[alive_T] = bargain_T / found.lengths_T[alive_T]
        return weights_T * min(1.0, self.max_norm / max(num_alive, 1) ** 0.5)
