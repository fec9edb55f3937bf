"""Independent component alignment."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.method import BalancedTasks
from mtl_dist.balance.solvers import RIDGE, angles, zero_below
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Aligned(GradientMethod):
    """All principal components of the gradients get the length of the smallest (Aligned-MTL, https://arxiv.org/abs/2305.19000).

        G = V diag(l) V^T,    w = sqrt(l_min) V diag(l^-1/2) V^T (1/T, ..., 1/T)

    over the eigenvalues that are not 0.

    Where we differ: how many eigenvalues are 0 is read from the cosines, where short gradients count as much
    as long ones; a threshold on l would take the task with the shortest gradient for a dependent one. And l
    and V are found from a factor of G, with the tasks in order of length: G itself holds squares of lengths,
    and rounds away that of a gradient 10^7 times shorter than another.

    Where gradients are linearly dependent (two tasks with the same labels) or 0, there are fewer components
    than tasks: these are aligned, and the first such window is named.

    `balance: {method: aligned}`
    """

    method: Literal["aligned"] = "aligned"

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        alive_T = found.lengths_T > 0
        values_T, vectors_TT = torch.linalg.eigh(found.cosines_TT[alive_T][:, alive_T])
        rank = int((values_T > zero_below(len(values_T))).sum())
        if rank < len(problem):
            self._report(rank, problem)
        if rank == 0:
            return torch.full_like(found.lengths_T, 1 / len(problem))
        lengths_T = found.lengths_T[alive_T]
        factor_TT = lengths_T[:, None] * vectors_TT * (values_T - RIDGE).clamp_min(0).sqrt()
        by_length = lengths_T.argsort(descending=True)
        _, triangle_TT = torch.linalg.qr(factor_TT[by_length].T)
        axes_TT, stretches_T, _ = torch.linalg.svd(triangle_TT.T)
        axes_TR, stretches_R = axes_TT[:, :rank], stretches_T[:rank]
        ordered_T = axes_TR @ (stretches_R[-1] / stretches_R * axes_TR.sum(dim=0) / len(problem))
        weights_T = torch.zeros_like(found.lengths_T)
        weights_T[alive_T.nonzero()[by_length, 0]] = ordered_T
        return weights_T

    def memory(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """How many windows had fewer components than tasks."""
        return {"num_dependent": torch.zeros((), dtype=torch.int64)}

    @staticmethod
    def _report(rank: int, problem: Problem) -> None:
        num_dependent = problem.state["num_dependent"]
        num_dependent += 1
        if num_dependent == 1:
            logger.warning(
                "balance: step %d: the gradients of %d tasks have rank %d (some depend on others, or are 0): "
                "aligned aligns so many components. This is reported once.",
                problem.key[1],
                len(problem),
                rank,
            )
