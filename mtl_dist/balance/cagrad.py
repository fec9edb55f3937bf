"""Conflict-averse gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.solvers import (
    MAX_PIVOTS_PER_TASK,
    NotConvergedError,
    angles,
    exchange_one,
    nonnegative_qp,
    stationary,
)
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_LEVELS = 60


class CAGrad(GradientMethod):
    """The best update for the worst task, near the mean gradient (https://arxiv.org/abs/2110.14048).

        max_d min_k g_k . d    over |d - g0| <= c |g0|,    g0 = mean_k g_k

    The papers' dual gives d = g0 + c |g0| g_w / |g_w| with g_w = sum_k w_k g_k.

    Where we differ: the dual is not minimised numerically. For a level t, the shortest s with
    g_k . (g0 + s) >= t for all k is a quadratic program, and |s| grows with t; the level at which
    |s| = c |g0| is found exactly, piece by piece. Where no direction helps every task (a convex combination
    of gradients is 0, or one of them is), t stops at 0, where nobody is hurt, and d may be shorter than the
    ball allows; nothing divides by |g_w|.

    `balance: {method: cagrad, c: 0.4, rescale: true}`

    c        how far from the mean gradient to look: 0 is the mean, near 1 comes close to MGDA
    rescale  divide the update by 1 + c^2, as the authors' experiments do
    """

    method: Literal["cagrad"] = "cagrad"
    c: float = Field(default=0.4, ge=0, lt=1)
    rescale: bool = True

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        found = angles(problem.gramian_TT)
        alive_T = found.lengths_T > 0
        weights_T = torch.full_like(found.lengths_T, 1 / len(problem))
        if alive_T.any():
            lengths_T = found.lengths_T[alive_T] / found.lengths_T.max()
            cosines_TT = found.cosines_TT[alive_T][:, alive_T]
            highest = torch.inf if alive_T.all() and not stationary(cosines_TT) else 0.0
            weights_T[alive_T] += worst_case_shift(cosines_TT, lengths_T, weights_T[alive_T], self.c, highest)
        return weights_T / (1 + self.c**2 if self.rescale else 1.0)


def worst_case_shift(
    cosines_TT: Tensor, lengths_T: Tensor, mean_T: Tensor, c: float, highest: float
) -> Tensor:
    """How far the weights go from the mean's: the s of the class, as weights, for levels up to `highest`.

    Works on x = shift * length, which minimises x^T C x / 2 - ((t - b) / length)^T x over x >= 0, where
    b_k = g_k . g0. On a set of positive entries x is linear in t, so |s|^2 = x^T C x is quadratic in it.
    """
    inverse_T = 1 / lengths_T
    push_T = cosines_TT @ (mean_T * lengths_T)
    mean_square = float((mean_T * lengths_T) @ push_T)
    radius_square = c**2 * mean_square
    low = float((lengths_T * push_T).min())
    high = min((1 + c) * mean_square, highest)
    if radius_square == 0:
        return torch.zeros_like(lengths_T)
    passive_T = _positive_along_the_levels(cosines_TT, push_T, inverse_T, high, radius_square)
    level = high
    if passive_T.any():
        level = min(high, _level_of_radius(cosines_TT, push_T, inverse_T, passive_T, radius_square))
    # Rounding may have misled the path; then a search between two levels corrects it.
    for _ in range(MAX_LEVELS):
        linear_T = push_T - level * inverse_T
        x_T = nonnegative_qp(cosines_TT, linear_T[None], passive_T[None])[0]
        square = float(x_T @ cosines_TT @ x_T)
        passive_T = x_T > cosines_TT @ x_T + linear_T
        reached = abs(square - radius_square) <= 1e-10 * radius_square
        if reached or (level == highest and square < radius_square) or level <= low:
            return x_T / lengths_T
        if square > radius_square:
            high = level
        else:
            low = level
        level = _level_of_radius(cosines_TT, push_T, inverse_T, passive_T, radius_square)
        if not low < level < high:
            level = (low + high) / 2
    raise NotConvergedError(f"the level of the worst task still moves after {MAX_LEVELS} steps")


def _positive_along_the_levels(
    cosines_TT: Tensor, push_T: Tensor, inverse_T: Tensor, high: float, radius_square: float
) -> Tensor:
    """Which entries are positive where |s|^2 reaches `radius_square`, or at the level `high` before it.

    As the level rises from where no shift is needed, entry after entry or its slack reaches 0 and becomes the
    other (parametric principal pivoting, as in solvers.py: the variables are A (the others) + a + level * p).
    """
    num_tasks = len(push_T)
    tableau = torch.cat([cosines_TT, push_T[:, None], -inverse_T[:, None]], dim=1).numpy()
    start, rise = tableau[:, -2], tableau[:, -1]
    push, inverse = push_T.numpy(), inverse_T.numpy()
    positive = np.zeros(num_tasks, dtype=bool)
    for _ in range(MAX_PIVOTS_PER_TASK * num_tasks):
        levels = np.divide(start, -rise, out=np.full(num_tasks, np.inf), where=rise < 0)
        entry = int(levels.argmin())
        level = levels[entry]
        if level >= high:
            break
        # On the positive entries C x = level / length - push.
        x = (start + level * rise) * positive
        if x @ (level * inverse - push) >= radius_square:
            break
        exchange_one(tableau, entry)
        positive[entry] ^= True
    return torch.from_numpy(positive)


def _level_of_radius(
    cosines_TT: Tensor, push_T: Tensor, inverse_T: Tensor, passive_T: Tensor, radius_square: float
) -> float:
    """The level t at which x(t)^T C x(t) is `radius_square`, if the positive entries stay the same."""
    sides_T2 = torch.stack([inverse_T, push_T], dim=1)[passive_T]
    factor_TT = torch.linalg.cholesky(cosines_TT[passive_T][:, passive_T])
    products = sides_T2.T @ torch.cholesky_solve(sides_T2, factor_TT)
    slope, mixed, constant = float(products[0, 0]), float(products[0, 1]), float(products[1, 1])
    root = max(mixed**2 - slope * (constant - radius_square), 0.0) ** 0.5
    return (mixed + root) / slope if slope > 0 else -torch.inf
