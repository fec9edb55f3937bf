"""The small problems under the balancing methods, solved exactly: T x T numbers, float64, on the CPU.

A Gramian G = S C S is the cosines C between the gradients and their lengths S. The solvers work on C, so that
a task whose gradients are a million times shorter than another's is solved as precisely. To C comes a small
ridge: a float32 Gramian cannot tell a cosine of 1 - 1e-6 from 1, and with it every problem has one solution,
also where gradients are duplicated, opposite or linearly dependent.

T tasks, N problems of the same matrix solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing

from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-6
ROUNDING = 1e-13
NEARLY_DEPENDENT = 0.1
NEARLY_ALIKE = 0.99
MAX_EXCHANGES = 3
MAX_REPAIRS = 5
MAX_PIVOTS_PER_TASK = 10
SMALLEST_PUSH = 1e-12
MAX_NEWTON_STEPS = 200


Array: TypeAlias = np.typing.NDArray[np.floating[Any]]
Bools: TypeAlias = np.typing.NDArray[np.bool_]
Integers: TypeAlias = np.typing.NDArray[np.intp]


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
    every problem to the last digit. They can cycle where gradients are dependent; there, and with what they
    leave, it goes on entry by entry, which ends.

    Raises:
        NotConvergedError: neither ended.
    """
    # In NumPy, whose small operations cost a third of torch's.
    matrix, linear = matrix_TT.numpy(), linear_NT.numpy()
    passive = linear < 0 if passive_NT is None else passive_NT.numpy()
    num_exchanges = 0 if len(linear) > 1 and _will_cycle(matrix) else MAX_EXCHANGES
    x, passive, unsolved = _exchange(matrix, linear, passive, num_exchanges)
    if unsolved.any():
        linear, guess = linear[unsolved], passive[unsolved][0]
        if len(linear) > 1:
            # What solves their mean is not far from what solves each of them.
            mean = torch.from_numpy(linear.mean(axis=0, keepdims=True))
            guess = nonnegative_qp(matrix_TT, mean)[0].numpy() > 0
        x[unsolved] = _follow_a_path(matrix, linear, guess)
    return torch.from_numpy(x)


def _will_cycle(matrix: Array) -> bool:
    """Whether exchanges are in vain: among gradients in general position that span fewer dimensions than they
    are, but not much fewer. A wrong answer costs time only."""
    num_tasks = len(matrix)
    rank = np.count_nonzero(np.linalg.cholesky(matrix).diagonal() ** 2 > NEARLY_DEPENDENT)
    are_distinct = np.count_nonzero(np.abs(matrix) > NEARLY_ALIKE) == num_tasks
    return bool(num_tasks / 8 < rank < num_tasks and are_distinct)


def _exchange(matrix: Array, linear: Array, passive: Bools, max_exchanges: int) -> tuple[Array, Bools, Bools]:
    """Block pivoting from a guess: the solutions, the next guesses, and which problems are unsolved."""
    x, passive = np.zeros_like(linear), passive.copy()
    unsolved = np.ones(len(linear), dtype=bool)
    diagonal = np.arange(len(matrix))
    for _ in range(max_exchanges):
        if not unsolved.any():
            break
        q, kept = linear[unsolved], passive[unsolved]
        squares = matrix * kept[:, :, None] * kept[:, None, :]
        squares[:, diagonal, diagonal] += ~kept
        found = np.linalg.solve(squares, (-q * kept)[:, :, None])[:, :, 0]
        wrong = _wrong(matrix, q, kept, found)
        x[unsolved] = found
        passive[unsolved] ^= wrong
        unsolved[unsolved] = wrong.any(axis=1)
    return x, passive, unsolved


def _wrong(matrix: Array, linear: Array, passive: Bools, x: Array) -> Bools:
    """Which entries of x, or else their slacks, are negative."""
    # Rounding makes a slack negative, never an entry: along directions which only the ridge holds, an
    # entry of -1e-10 is a slack of 1e-16, and is better left out.
    size = (np.abs(linear) + np.abs(x)).max(axis=1, keepdims=True)
    return np.where(passive, x < 0, x @ matrix + linear < -ROUNDING * size)


def _follow_a_path(matrix: Array, linear: Array, guess: Bools) -> Array:
    """The solutions of `nonnegative_qp`, from one guess for all that may be far off.

    Parametric principal pivoting (Cottle, Pang and Stone, The Linear Complementarity Problem, 4.5): with
    enough of a push t p, p > 0, the guess is right. As t falls to 0, entry after entry or its slack reaches
    0, and becomes the other. It does not cycle, because t only falls; and few entries have to change where
    the guess is good.

    A tableau holds the basic variables (the entries believed not 0, the slacks of the others) as
    A (the non-basic ones) + a + t p: [A, a, p].
    """
    num_problems, num_tasks = linear.shape
    identity = np.eye(num_tasks)
    basic, products = identity * guess, matrix * guess
    sides = np.concatenate([matrix - products - basic, linear.T], axis=1)
    solved = np.linalg.solve(identity - basic - products, sides)
    start = solved[:, num_tasks:].T
    size = np.abs(start)
    push = np.where(
        guess,
        np.where(guess, size, 0.0).max(axis=1, keepdims=True),
        np.where(guess, 0.0, size).max(axis=1, keepdims=True),
    )
    tableaus = np.empty((num_problems, num_tasks, num_tasks + 2))
    tableaus[:, :, :-2], tableaus[:, :, -2] = solved[:, :num_tasks], start
    # Not all alike: what reaches 0 together could be pivoted to and fro.
    tableaus[:, :, -1] = (push + SMALLEST_PUSH) * np.linspace(1, 1.3, num_tasks)
    passive = np.tile(guess, (num_problems, 1))
    whole, open_N = tableaus, np.arange(num_problems)
    for _ in range(MAX_PIVOTS_PER_TASK * num_tasks):
        start, push = tableaus[:, :, -2], tableaus[:, :, -1]
        ratios = np.divide(start, push, out=np.full_like(start, np.inf), where=push > 0)
        entries = ratios.argmin(axis=1)
        moving = np.flatnonzero(ratios[np.arange(len(entries)), entries] < 0)
        if len(moving) == 0:
            break
        if 2 * len(moving) <= len(tableaus):
            # Those at their end need not be carried along.
            whole[open_N] = tableaus
            open_N, tableaus, entries = open_N[moving], tableaus[moving], entries[moving]
            moving = np.arange(len(moving))
        exchange_basic(tableaus, moving, entries[moving])
        passive[open_N[moving], entries[moving]] ^= True
    whole[open_N] = tableaus
    # Among the basic entries A is the inverse of M: it takes off what rounding left.
    x = np.where(passive, whole[:, :, -2], 0.0)
    rest = np.where(passive, x @ matrix + linear, 0.0)
    x -= np.where(passive, np.einsum("nij,nj->ni", whole[:, :, :-2], rest), 0.0)
    unsolved = _wrong(matrix, linear, passive, x).any(axis=1)
    x[unsolved], _, unsolved = _exchange(matrix, linear[unsolved], passive[unsolved], MAX_REPAIRS)
    if unsolved.any():
        raise NotConvergedError(f"a quadratic program is wrong after {MAX_REPAIRS} repairs of its path's end")
    return x


def exchange_one(tableau: Array, entry: int) -> None:
    """In variables = A (the others) + ..., one variable changes places with its other."""
    column, row = tableau[:, entry].copy(), tableau[entry].copy()
    pivot = column[entry]
    row /= -pivot
    tableau += column[:, None] * row
    tableau[entry] = row
    tableau[:, entry] = column / pivot
    tableau[entry, entry] = 1 / pivot


def exchange_basic(tableaus: Array, moving: Integers, entries: Integers) -> None:
    """`exchange_one` in each of the tableaus `moving`."""
    if len(tableaus) == 1:
        exchange_one(tableaus[0], int(entries[0]))
        return
    column, row = tableaus[moving, :, entries], tableaus[moving, entries]
    pivot = row[np.arange(len(moving)), entries][:, None]
    row /= -pivot
    columns, rows = column, row
    if len(moving) < len(tableaus):
        columns, rows = np.zeros(tableaus.shape[:2]), np.zeros(tableaus.shape[::2])
        columns[moving], rows[moving] = column, row
    # NumPy's own product of columns and rows takes three times as long.
    torch.from_numpy(tableaus).baddbmm_(
        torch.from_numpy(columns[:, :, None]), torch.from_numpy(rows[:, None, :])
    )
    tableaus[moving, entries] = row
    tableaus[moving, :, entries] = column / pivot
    tableaus[moving, entries, entries] = 1 / pivot[:, 0]


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
