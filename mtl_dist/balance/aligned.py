"""Independent component alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import angles, zero_below
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Aligned(GradientMethod):
    """All principal components of the gradients get the length of the smallest (Aligned-MTL, https://arxiv.org/abs/2305.19000).

        G = V diag(l) V^T,    w = sqrt(l_min) V diag(l^-1/2) V^T (1/T, ..., 1/T)

    over the eigenvalues that are not 0.

    Where we differ: how many eigenvalues are 0 is read from the cosines, where short gradients count as much
    as long ones; a threshold on l would take the task with the shortest gradient for a dependent one.

    `balance: {method: aligned}`
    """

    method: Literal["aligned"] = "aligned"

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        num_tasks = len(problem)
        mean_T = torch.full((num_tasks,), 1 / num_tasks, dtype=problem.gramian_TT.dtype)
        found = angles(problem.gramian_TT)
        alive_T = found.lengths_T > 0
        cosines_TT = found.cosines_TT[alive_T][:, alive_T]
        rank = int((torch.linalg.eigvalsh(cosines_TT) > zero_below(len(cosines_TT))).sum())
        if rank == 0:
            return mean_T
        values_T, vectors_TT = torch.linalg.eigh(problem.gramian_TT)
        values_T, vectors_TT = values_T[-rank:], vectors_TT[:, -rank:]
        stretch_T = (values_T[0] / values_T).sqrt()
        return vectors_TT @ (stretch_T * (vectors_TT.T @ mean_T))
