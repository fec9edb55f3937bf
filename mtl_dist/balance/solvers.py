"""The small problems under the balancing methods, solved exactly: T x T numbers, float64, on the CPU.

A Gramian G = S C S is the cosines C between the gradients and their lengths S. The solvers work on C, so that
a task whose gradients are a million times shorter than another's is solved as precisely. To C comes a small
ridge: a float32 Gramian cannot tell a cosine of 1 - 1e-6 from 1, and with it every problem has one solution,
also where gradients are duplicated, opposite or linearly dependent.

T tasks, N problems of the same matrix solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-6
NEGATIVE_TOLERANCE = 1e-9
ROUNDING = 1e-13
PATIENCE = 2
MAX_INTERIOR_STEPS = 60
SMALLEST_GAP = 1e-18
MAX_NEWTON_STEPS = 200


class NotConvergedError(ArithmeticError):
    """A solver gave up; the message says which and why."""


@dataclass(frozen=True)
class Angles:
    """What a Gramian says: `cosines_TT` (positive definite, diagonal 1 + ridge) and `lengths_T`.

    A gradient of length 0 is at right angles to every other.
    """

    cosines_TT: Tensor
    lengths_T: Tensor


def angles(gramian_TT: Tensor) -> Angles:
    """The cosines and lengths of a finite float64 Gramian of gradients."""
    lengths_T = gramian_TT.diagonal().clamp_min(0).sqrt()
    # A length below float32's smallest number is a Gramian's way to say 0.
    lengths_T = torch.where(lengths_T > torch.finfo(torch.float32).tiny ** 0.5, lengths_T, 0.0)
    inverse_T = torch.where(lengths_T > 0, 1 / lengths_T, 0.0)
    cosines_TT = (gramian_TT * inverse_T[:, None] * inverse_T[None, :]).clamp(-1, 1)
    cosines_TT = (cosines_TT + cosines_TT.T) / 2
    cosines_TT.fill_diagonal_(1 + RIDGE)
    _, failed = torch.linalg.cholesky_ex(cosines_TT)
    if failed:
        # Rounding made it indefinite by more than the ridge: the nearest matrix that is a Gramian.
        values_T, vectors_TT = torch.linalg.eigh(cosines_TT)
        cosines_TT = (vectors_TT * values_T.clamp_min(RIDGE)) @ vectors_TT.T
    return Angles(cosines_TT, lengths_T)


def zero_below(num_tasks: int) -> float:
    """Eigenvalues of the cosines up to this are 0: nothing is above the ridge but a float32's rounding."""
    return RIDGE * (1 + num_tasks)


def nonnegative_qp(matrix_TT: Tensor, linear_NT: Tensor, passive_NT: Tensor | None = None) -> Tensor:
    """min x^T M x / 2 + q^T x over x >= 0, for each row q of `linear_NT`; M is positive definite.

    Block pivoting (Kim and Park, https://doi.org/10.1137/110821172): guess which entries are not 0
    (`passive_NT`), solve for them, exchange all that came out infeasible. A few exchanges settle almost
    every problem to the last digit; it can cycle where gradients are many and dependent, and what is not
    settled when PATIENCE exchanges have brought nothing goes to an interior point method, which always ends.

    Raises:
        NotConvergedError: neither ended.
    """
    x_NT = torch.zeros_like(linear_NT)
    identity_TT = torch.eye(len(matrix_TT), dtype=matrix_TT.dtype)
    open_N = torch.arange(len(linear_NT))
    linear = linear_NT
    passive = linear < 0 if passive_NT is None else passive_NT
    fewest, patience = linear_NT.numel() + 1, PATIENCE
    while patience > 0:
        both = passive[:, :, None] & passive[:, None, :]
        factors = torch.linalg.cholesky(torch.where(both, matrix_TT, identity_TT))
        x = torch.cholesky_solve(torch.where(passive, -linear, 0.0)[:, :, None], factors)[:, :, 0]
        slack = torch.where(passive, 0.0, x @ matrix_TT + linear)
        x_NT[open_N] = x.clamp_min(0)
        lowest_x = -NEGATIVE_TOLERANCE * x.abs().amax(dim=1, keepdim=True)
        # Much tighter: along directions which only the ridge holds, x moves by a million times the slack.
        lowest_slack = -ROUNDING * (linear.abs() + x.abs()).amax(dim=1, keepdim=True)
        wrong = (x < lowest_x) | (slack < lowest_slack)
        unsolved = wrong.any(dim=1)
        if not unsolved.any():
            return x_NT
        num_wrong = int(wrong.sum())
        patience = PATIENCE if num_wrong < fewest else patience - 1
        fewest = min(fewest, num_wrong)
        open_N, linear = open_N[unsolved], linear[unsolved]
        passive = passive[unsolved] ^ wrong[unsolved]
    x_NT[open_N] = _interior_point(matrix_TT, linear)
    return x_NT


def _interior_point(matrix_TT: Tensor, linear_NT: Tensor) -> Tensor:
    """`nonnegative_qp` along the central path: slower, and without a cycle."""
    sizes_N1 = linear_NT.abs().amax(dim=1, keepdim=True)
    linear_NT = linear_NT / sizes_N1
    x_NT, slack_NT = torch.ones_like(linear_NT), torch.ones_like(linear_NT)
    for _ in range(MAX_INTERIOR_STEPS):
        residual_NT = x_NT @ matrix_TT + linear_NT - slack_NT
        products_NT = x_NT * slack_NT
        gap_N1 = products_NT.mean(dim=1, keepdim=True)
        rounding_N1 = ROUNDING * (1 + x_NT.amax(dim=1, keepdim=True))
        if bool((gap_N1 < SMALLEST_GAP).all() and (residual_NT.abs() < rounding_N1).all()):
            return x_NT * sizes_N1
        # Newton's step to where every product is a tenth of today's mean. Mehrotra's corrector would save
        # some steps and was seen to cycle.
        factors = torch.linalg.cholesky(matrix_TT + torch.diag_embed(slack_NT / x_NT))
        aim_NT = (0.1 * gap_N1 - products_NT) / x_NT
        dx_NT = torch.cholesky_solve((aim_NT - residual_NT)[:, :, None], factors)[:, :, 0]
        dslack_NT = aim_NT - slack_NT / x_NT * dx_NT
        shrink_N1 = torch.maximum(-dx_NT / x_NT, -dslack_NT / slack_NT).amax(dim=1, keepdim=True)
        size_N1 = 1 / (shrink_N1 / 0.995).clamp_min(1)
        x_NT = x_NT + size_N1 * dx_NT
        slack_NT = slack_NT + size_N1 * dslack_NT
    raise NotConvergedError(f"the quadratic program still moves after {MAX_INTERIOR_STEPS} interior steps")


def dual_cone_shift(cosines_TT: Tensor, targets_NT: Tensor) -> Tensor:
    """min (u + x)^T C (u + x) over x >= 0: how to shift each row u so that nobody is hurt by C (u + x)."""
    return nonnegative_qp(cosines_TT, targets_NT @ cosines_TT)


def stationary(cosines_TT: Tensor) -> bool:
    """Whether a convex combination of the gradients is 0, up to the ridge: no direction helps every task."""
    ones_T = torch.ones(1, len(cosines_TT), dtype=cosines_TT.dtype)
    # The shortest vector in the hull of the unit gradients has the square 1 / sum(x).
    return float(nonnegative_qp(cosines_TT, -ones_T).sum()) * 10 * RIDGE > 1


def power_balance(cosines_TT: Tensor, scale_T: Tensor, power: float) -> Tensor:
    """The positive x with C x = scale * x^(-power), by damped Newton on the convex function behind it.

    Raises:
        NotConvergedError: more than MAX_NEWTON_STEPS steps.
    """

    def value(x_T: Tensor) -> Tensor:
        barrier_T = x_T.log() if power == 1 else x_T.pow(1 - power) / (1 - power)
        return x_T @ cosines_TT @ x_T / 2 - scale_T @ barrier_T

    x_T = scale_T.pow(1 / (1 + power))
    for _ in range(MAX_NEWTON_STEPS):
        target_T = scale_T * x_T.pow(-power)
        gradient_T = cosines_TT @ x_T - target_T
        if bool((gradient_T.abs() <= 1e-8 * target_T + ROUNDING * x_T.sum()).all()):
            return x_T
        hessian_TT = cosines_TT + torch.diag(power * target_T / x_T)
        factor_TT = torch.linalg.cholesky(hessian_TT)
        step_T = -torch.cholesky_solve(gradient_T[:, None], factor_TT)[:, 0]
        decrease = float(-gradient_T @ step_T)
        size = min(1.0, 0.99 / max(float((-step_T / x_T).amax()), 1e-300))
        now = value(x_T)
        # Next to the solution the value's rounding is larger than what is still to be gained.
        if decrease > 1e-9 * abs(now):
            while value(x_T + size * step_T) > now - 1e-4 * size * decrease:
                size /= 2
                if size < 1e-12:
                    raise NotConvergedError("Newton's line search found no decrease")
        x_T = x_T + size * step_T
    raise NotConvergedError(f"Newton's method still moves after {MAX_NEWTON_STEPS} steps")
