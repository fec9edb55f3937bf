"""Independent component alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import RIDGE, angles, zero_below
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Aligned(GradientMethod):
    """All principal components of the gradients get the length of the smallest (Aligned-MTL, https://arxiv.org/abs/2305.19000).

        G = V diag(l) V^T,    w = sqrt(l_min) V diag(l^-1/2) V^T (1/T, ..., 1/T)

    over the eigenvalues that are not 0.

    Where we differ: how many eigenvalues are 0 is read from the cosines, where short gradients count as much
    as long ones; a threshold on l would take the task with the shortest gradient for a dependent one. And l
    and V are found from a factor of G, with the tasks in order of length: G itself holds squares of lengths,
    and rounds away that of a gradient 10^7 times shorter than another.

    `balance: {method: aligned}`
    """

    method: Literal["aligned"] = "aligned"

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        alive_T = found.lengths_T > 0
        values_T, vectors_TT = torch.linalg.eigh(found.cosines_TT[alive_T][:, alive_T])
        rank = int((values_T > zero_below(len(values_T))).sum())
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
