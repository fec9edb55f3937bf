"""Impartial multi-task learning, the gradient balance (IMTL-G)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import RIDGE, angles, zero_below
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class IMTLG(GradientMethod):
    """The update projects equally onto every task's gradient (ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr).

        d = sum_k w_k g_k,    d . g_k / |g_k| the same for all k,    sum_k w_k = 1

    so w is proportional to G^-1 (|g_1|, ..., |g_T|); entries may be negative.

    Where we differ: where the gradients are linearly dependent, by the pseudo-inverse of the cosines, so that
    scaling a loss never changes the direction (TorchJD's generalisation is by that of G). Where no direction
    projects equally (opposite gradients), the weights are 0, as in TorchJD; so is that of a task without
    gradient.

    `balance: {method: imtl-g}`
    """

    method: Literal["imtl-g"] = "imtl-g"

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        alive_T = found.lengths_T > 0
        values_T, vectors_TT = torch.linalg.eigh(found.cosines_TT[alive_T][:, alive_T])
        inverse_T = torch.where(values_T > zero_below(len(values_T)), 1 / values_T, 0.0)
        pulls_T = vectors_TT @ (inverse_T * vectors_TT.sum(dim=0)) / found.lengths_T[alive_T]
        weights_T = torch.zeros_like(found.lengths_T)
        total = pulls_T.sum()
        if total.abs() > RIDGE * pulls_T.abs().sum():
            weights_T[alive_T] = pulls_T / total
        return weights_T
