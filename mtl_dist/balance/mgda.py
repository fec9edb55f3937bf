"""Multiple gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.method import SMALLEST_LOSS
from mtl_dist.balance.solvers import angles, nonnegative_qp
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class MGDA(GradientMethod):
    """The shortest vector in the convex hull of the gradients (https://arxiv.org/abs/1810.04650).

        min_w |sum_k w_k g_k / n_k|^2    over w >= 0, sum_k w_k = 1

    with n = 1, |g|, L or L |g|. The answer is the one direction in which all the (normalised) tasks descend.

    Where we differ: exact instead of Frank-Wolfe; and the weights are w_k / n_k, so that the update is that
    shortest vector (the official code applies w to gradients which are not normalised). With
    `level: features` this is MGDA-UB. A task without gradient takes all the weight, as in the paper: nothing
    moves, since the window is Pareto stationary.

    `balance: {method: mgda, normalize: none}`; `normalize` divides gradients by length, loss or both.
    """

    method: Literal["mgda"] = "mgda"
    normalize: Literal["none", "l2", "loss", "loss+"] = "none"

    def _divisors(self, lengths_T: Tensor, losses_T: Tensor) -> Tensor:
        divisors_T = torch.ones_like(lengths_T)
        if self.normalize in ("loss", "loss+"):
            divisors_T = divisors_T * losses_T.clamp_min(SMALLEST_LOSS)
        if self.normalize in ("l2", "loss+"):
            divisors_T = divisors_T * torch.where(lengths_T > 0, lengths_T, 1.0)
        return divisors_T

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        divisors_T = self._divisors(found.lengths_T, problem.losses_T)
        lengths_T = found.lengths_T / divisors_T
        if (lengths_T == 0).any():
            weights_T = (lengths_T == 0).double()
        else:
            # min w^T G w over the simplex is min x^T C x / 2 - sum(x / length) over x >= 0, up to a factor.
            linear_T = -lengths_T.min() / lengths_T
            weights_T = nonnegative_qp(found.cosines_TT, linear_T[None])[0] / lengths_T
        return weights_T / weights_T.sum() / divisors_T
