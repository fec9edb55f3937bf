"""The small problems under the balancing methods, solved exactly: T x T numbers, float64, on the CPU.

A Gramian G = S C S is the cosines C between the gradients and their lengths S. The solvers work on C, so that
a task whose gradients are a million times shorter than another's is solved as precisely. To C comes a small
ridge: a float32 Gramian cannot tell a cosine of 1 - 1e-6 from 1, and with it every problem has one solution,
also where gradients are duplicated, opposite or linearly dependent.

T tasks, N problems of the same matrix solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing
import torch
from torch import Tensor

RIDGE = 1e-6
ROUNDING = 1e-13
MAX_EXCHANGES = 3
MAX_REPAIRS = 5
MAX_PIVOTS_PER_TASK = 10
SMALLEST_PUSH = 1e-12
MAX_NEWTON_STEPS = 200


Array: TypeAlias = np.typing.NDArray[np.float64]


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
    every problem to the last digit; they can cycle where gradients are many and dependent, and what they
    leave goes on entry by entry, which ends.

    Raises:
        NotConvergedError: neither ended.
    """
    passive_NT = linear_NT < 0 if passive_NT is None else passive_NT
    x_NT, passive_NT, unsolved_N = _exchange(matrix_TT, linear_NT, passive_NT, MAX_EXCHANGES)
    if unsolved_N.any():
        linear, passive = linear_NT[unsolved_N], passive_NT[unsolved_N]
        passive = _pivot_along_a_path(matrix_TT, linear, passive)
        x_NT[unsolved_N], _, still_unsolved = _exchange(matrix_TT, linear, passive, MAX_REPAIRS)
        if still_unsolved.any():
            raise NotConvergedError(
                f"a quadratic program is wrong after {MAX_REPAIRS} repairs of its path's end"
            )
    return x_NT


def _exchange(
    matrix_TT: Tensor, linear_NT: Tensor, passive_NT: Tensor, max_exchanges: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Block pivoting from a guess: the solutions, the next guesses, and which problems are unsolved."""
    x_NT, passive_NT = torch.zeros_like(linear_NT), passive_NT.clone()
    unsolved_N = torch.ones(len(linear_NT), dtype=torch.bool)
    open_N = torch.arange(len(linear_NT))
    for _ in range(max_exchanges):
        linear, passive = linear_NT[open_N], passive_NT[open_N]
        kept = passive.to(linear.dtype)
        squares = matrix_TT * kept[:, :, None] * kept[:, None, :]
        squares.diagonal(dim1=1, dim2=2).add_(1 - kept)
        x = torch.cholesky_solve((-linear * kept)[:, :, None], torch.linalg.cholesky(squares))[:, :, 0]
        slack = (x @ matrix_TT + linear) * (1 - kept)
        # Rounding makes a slack negative, never an entry: along directions which only the ridge holds, an
        # entry of -1e-10 is a slack of 1e-16, and is better left out.
        lowest_slack = -ROUNDING * (linear.abs() + x.abs()).amax(dim=1, keepdim=True)
        wrong = (x < 0) | (slack < lowest_slack)
        x_NT[open_N] = x
        passive_NT[open_N] = passive ^ wrong
        unsolved_N[open_N] = wrong.any(dim=1)
        open_N = unsolved_N.nonzero()[:, 0]
        if len(open_N) == 0:
            break
    return x_NT, passive_NT, unsolved_N


def _pivot_along_a_path(matrix_TT: Tensor, linear_NT: Tensor, passive_NT: Tensor) -> Tensor:
    """Which entries of each `nonnegative_qp` are not 0, from a guess that may be far off.

    Parametric principal pivoting (Cottle, Pang and Stone, The Linear Complementarity Problem, 4.5): with
    enough of a push t p, p > 0, the guess is right. As t falls to 0, entry after entry or its slack reaches
    0, and becomes the other. It does not cycle, because t only falls; and few entries have to change where
    the guess is good.

    A tableau holds the basic variables (the entries believed not 0, the slacks of the others) as
    A (the non-basic ones) + a + t p: [A, a, p], in NumPy, whose small operations cost a third of torch's.
    """
    num_problems, num_tasks = linear_NT.shape
    basic = torch.diag_embed(passive_NT.to(linear_NT.dtype))
    identity_TT = torch.eye(num_tasks, dtype=linear_NT.dtype)
    sides = torch.cat([matrix_TT - matrix_TT @ basic - basic, linear_NT[:, :, None]], dim=2)
    solved = torch.linalg.solve(identity_TT - basic - matrix_TT @ basic, sides)
    start_NT, sizes_NT = solved[:, :, -1], solved[:, :, -1].abs()
    push_NT = torch.where(
        passive_NT,
        torch.where(passive_NT, sizes_NT, 0.0).amax(dim=1, keepdim=True),
        torch.where(passive_NT, 0.0, sizes_NT).amax(dim=1, keepdim=True),
    )
    # Not all alike: what reaches 0 together could be pivoted to and fro.
    push_NT = (push_NT + SMALLEST_PUSH) * torch.linspace(1, 1.3, num_tasks, dtype=start_NT.dtype)
    tableaus = torch.cat([solved, push_NT[:, :, None]], dim=2).numpy()
    passive = passive_NT.numpy().copy()
    open_N = np.arange(num_problems)
    for _ in range(MAX_PIVOTS_PER_TASK * num_tasks):
        start, push = tableaus[:, :, -2], tableaus[:, :, -1]
        ratios = np.divide(start, push, out=np.full_like(start, np.inf), where=push > 0)
        entry = ratios.argmin(axis=1)
        moving = ratios[np.arange(len(entry)), entry] < 0
        if not moving.all():
            open_N, tableaus, entry = open_N[moving], tableaus[moving], entry[moving]
            if len(open_N) == 0:
                break
        exchange_basic(tableaus, entry)
        passive[open_N, entry] ^= True
    return torch.from_numpy(passive)


def exchange_basic(tableaus: Array, entry: numpy.typing.NDArray[np.int64]) -> None:
    """In each tableau, variables = A (the others) + ..., variable `entry` changes places with its other."""
    rows = np.arange(len(entry))
    column = tableaus[rows, :, entry]
    row = tableaus[rows, entry]
    pivot = row[rows, entry][:, None]
    row /= -pivot
    tableaus += column[:, :, None] * row[:, None, :]
    tableaus[rows, entry] = row
    tableaus[rows, :, entry] = column / pivot
    tableaus[rows, entry, entry] = 1 / pivot[:, 0]


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

    # In NumPy, whose small operations cost a third of torch's.
    cosines, scale = cosines_TT.numpy(), scale_T.numpy()

    def value(x: Array) -> float:
        barrier = np.log(x) if power == 1 else x ** (1 - power) / (1 - power)
        return float(x @ (cosines @ x) / 2 - scale @ barrier)

    x = scale ** (1 / (1 + power))
    for _ in range(MAX_NEWTON_STEPS):
        target = scale * x**-power
        gradient = cosines @ x - target
        if (np.abs(gradient) <= 1e-8 * target + ROUNDING * x.sum()).all():
            return torch.from_numpy(x)
        step = -np.linalg.solve(cosines + np.diag(power * target / x), gradient)
        decrease = float(-gradient @ step)
        size = min(1.0, 0.99 / max(float((-step / x).max()), 1e-300))
        now = value(x)
        # Next to the solution the value's rounding is larger than what is still to be gained.
        if decrease > 1e-9 * abs(now):
            while value(x + size * step) > now - 1e-4 * size * decrease:
                size /= 2
                if size < 1e-12:
                    raise NotConvergedError("Newton's line search found no decrease")
        x = x + size * step
    raise NotConvergedError(f"Newton's method still moves after {MAX_NEWTON_STEPS} steps")
