"""A few of all combinations, in which every two values still meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any


def pairwise(
    *parameters: Sequence[Any], may_meet: Callable[[Any, Any], bool] = lambda one, other: True
) -> list[tuple[Any, ...]]:
    """Combinations of one value of each parameter; any two values that may meet are together in one of them.

    `may_meet` is asked for values in the order of their parameters. Greedy and repeatable: a row begins with
    a pair that is still missing and takes, parameter by parameter, the value that brings the most missing
    pairs (of equals, the one used least).

        >>> len(pairwise("abc", "xy", "12"))
        6

    Raises:
        ValueError: no value of a parameter may meet those that a row already has.
    """
    values = [(i, value) for i, parameter in enumerate(parameters) for value in parameter]
    possible = {
        frozenset((one, other))
        for one, other in combinations(values, 2)
        if one[0] != other[0] and may_meet(one[1], other[1])
    }
    missing = dict.fromkeys(
        pair for one, other in combinations(values, 2) if (pair := frozenset((one, other))) in possible
    )
    used = dict.fromkeys(values, 0)
    rows: list[tuple[Any, ...]] = []
    while missing:
        row = sorted(next(iter(missing)), key=values.index)
        for i, parameter in enumerate(parameters):
            if i in (j for j, _ in row):
                continue
            fitting = [
                (i, value)
                for value in parameter
                if all(frozenset(((i, value), other)) in possible for other in row)
            ]
            if not fitting:
                raise ValueError(f"expected a value of parameter {i} that may meet {row}, found none")
            row.append(
                max(
                    fitting,
                    key=lambda new, row=row: (  # type: ignore[misc]
                        sum(frozenset((new, other)) in missing for other in row),
                        -used[new],
                    ),
                )
            )
        for pair in combinations(row, 2):
            missing.pop(frozenset(pair), None)
        for value in row:
            used[value] += 1
        rows.append(tuple(value for _, value in sorted(row, key=lambda pair: pair[0])))
    return rows
