"""Unconflicting projection of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import angles, dual_cone_shift
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class UPGrad(GradientMethod):
    """Each gradient is projected to where it hurts no task; the mean of these (https://arxiv.org/abs/2406.16232).

        w = (1/T) sum_i v_i,    v_i = argmin v^T G v over v >= e_i

    The projections go onto the dual cone of the gradients, {d : g_k . d >= 0 for all k}.

    Where we differ: the ridge that makes v unique is 1e-6 of each gradient's own square (TorchJD: 1e-4 of the
    sum of all).

    `balance: {method: upgrad}`
    """

    method: Literal["upgrad"] = "upgrad"

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        # Row i is task i's projection for a gradient of length 1, and grows with the length.
        shifts_TT = dual_cone_shift(found.cosines_TT, torch.eye(len(problem), dtype=found.lengths_T.dtype))
        shift_T = found.lengths_T @ shifts_TT
        return (1 + torch.where(found.lengths_T > 0, shift_T / found.lengths_T, 0.0)) / len(problem)
