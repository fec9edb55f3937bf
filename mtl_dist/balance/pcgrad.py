"""Projecting conflicting gradients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, generator
from mtl_dist.balance.gradient import GradientBalancer, GradientSettings, Problem


class PCGradSettings(GradientSettings):
    """`balance: {method: pcgrad}`"""

    method: Literal["pcgrad"] = "pcgrad"


class PCGrad(GradientBalancer):
    """Each gradient loses what points against another one (https://arxiv.org/abs/2001.06782).

        g_i <- g_i - (g_i . g_j / |g_j|^2) g_j    for every j, in random order, where g_i . g_j < 0

    and the results are summed. A sum of gradients stays one, so the inner products of G are enough.

    Where we differ: the orders come from (seed, step), the same on all ranks.
    """

    def __init__(self, settings: PCGradSettings, tasks: BalancedTasks) -> None:
        super().__init__(settings, tasks)

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        gramian_TT = problem.gramian_TT
        num_tasks = len(gramian_TT)
        orders_TT = torch.rand(num_tasks, num_tasks, generator=generator(problem.key, "cpu")).argsort(dim=1)
        rows_T = torch.arange(num_tasks)
        # Row i holds the coefficients of task i's projected gradient; all rows advance together.
        coefficients_TT = torch.eye(num_tasks, dtype=gramian_TT.dtype)
        for others_T in orders_TT.unbind(dim=1):
            inner_T = (coefficients_TT * gramian_TT[others_T]).sum(dim=1)
            squares_T = gramian_TT.diagonal()[others_T]
            conflict_T = (inner_T < 0) & (others_T != rows_T) & (squares_T > 0)
            coefficients_TT[rows_T, others_T] -= torch.where(conflict_T, inner_T / squares_T, 0.0)
        return coefficients_TT.sum(dim=0)
