"""Independent component alignment."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks
from mtl_dist.balance.gradient import GradientBalancer, GradientSettings, Problem


class AlignedSettings(GradientSettings):
    """`balance: {method: aligned}`"""

    method: Literal["aligned"] = "aligned"


class Aligned(GradientBalancer):
    """All principal components of the gradients get the length of the smallest (Aligned-MTL, https://arxiv.org/abs/2305.19000).

        G = V diag(l) V^T,    w = sqrt(l_min) V diag(l^-1/2) V^T (1/T, ..., 1/T)

    over the eigenvalues that are not 0.

    Where we differ: what counts as 0 is the rounding of a float32 Gramian, T eps l_max.
    """

    def __init__(self, settings: AlignedSettings, tasks: BalancedTasks) -> None:
        super().__init__(settings, tasks)

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        num_tasks = len(problem)
        mean_T = torch.full((num_tasks,), 1 / num_tasks, dtype=problem.gramian_TT.dtype)
        values_T, vectors_TT = torch.linalg.eigh(problem.gramian_TT)
        real_T = values_T > num_tasks * torch.finfo(torch.float32).eps * values_T.max()
        if not real_T.any():
            return mean_T
        smallest = values_T[real_T].min()
        stretch_T = torch.where(real_T, (smallest / values_T).sqrt(), 0.0)
        return vectors_TT @ (stretch_T * (vectors_TT.T @ mean_T))
