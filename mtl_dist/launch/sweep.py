"""A sweep: one run per point of the product of some settings' values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from mtl_dist.errors import UserError


def sweep_points(sweeps: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every point: the product of all sweeps, the last one running fastest.

    >>> list(sweep_points(["a.b=1,2", "c=x,y"]))
    [['a.b=1', 'c=x'], ['a.b=1', 'c=y'], ['a.b=2', 'c=x'], ['a.b=2', 'c=y']]
    """
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not all(split_values(values)):
            raise UserError(f"--sweep: expected a.b=1,2,3, found {sweep!r}.")
        axes.append([f"{key}={value}" for value in split_values(values)])
    for point in itertools.product(*axes):
        yield list(point)


def split_values(text: str) -> list[str]:
    """The values between the commas that stand outside of brackets.

    >>> split_values("[1,2],[3]")
    ['[1,2]', '[3]']
    """
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def point_labels(points: Sequence[Sequence[str]]) -> list[str]:
    """A folder name for every point: its values, with keys as short as they are clear.

    >>> point_labels([["optim.lr=1e-3", "balance.method=equal"], ["optim.lr=1e-2", "balance.method=equal"]])
    ['0-lr=1e-3-method=equal', '1-lr=1e-2-method=equal']
    """
    labels = []
    for number, point in enumerate(points):
        last = [override.partition("=")[0].rsplit(".", 1)[-1] for override in point]
        named = [
            override if last.count(name) > 1 else f"{name}={override.partition('=')[2]}"
            for name, override in zip(last, point, strict=True)
        ]
        width = len(str(len(points) - 1))
        labels.append(re.sub(r"[^\w=.+-]+", "_", "-".join([f"{number:0{width}}", *named])))
    return labels
