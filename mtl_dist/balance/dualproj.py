"""Projection onto the dual cone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import angles, dual_cone_shift
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class DualProj(GradientMethod):
    """The mean gradient, projected to where it hurts no task (GEM's rule; https://arxiv.org/abs/2406.16232).

        w = argmin v^T G v over v >= (1/T, ..., 1/T)

    Where we differ: the ridge that makes w unique is 1e-6 of each gradient's own square (TorchJD: 1e-4 of the
    sum of all).

    `balance: {method: dualproj}`
    """

    method: Literal["dualproj"] = "dualproj"

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        target_T = found.lengths_T / found.lengths_T.max().clamp_min(1e-300)
        shift_T = dual_cone_shift(found.cosines_TT, target_T[None])[0]
        return (1 + torch.where(target_T > 0, shift_T / target_T, 0.0)) / len(problem)
