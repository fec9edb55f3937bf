"""A sweep: one run per point of the product of some settings' values.

`mtl sweep` and `mtl submit --sweep` read it alike: `a.b=1,2,3`; commas in brackets or quotes do not divide.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence

from mtl_dist.errors import UserError

_LONGEST_LABEL = 100


def sweep_points(sweeps: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every point: the product of all sweeps, the last one running fastest.

    >>> list(sweep_points(["a.b=1,2", "c=x,y"]))
    [['a.b=1', 'c=x'], ['a.b=1', 'c=y'], ['a.b=2', 'c=x'], ['a.b=2', 'c=y']]

    Raises:
        UserError: one has another form, or a key or a value appears twice.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = split_values(text)
        if not key or not equals or not all(values):
            raise UserError(f"sweep: expected a.b=1,2,3, found {sweep!r}.")
        if key in axes:
            raise UserError(f"sweep: expected each key once, found {key} twice. Write {key}=1,2,3.")
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"sweep: expected each value of {key} once, found {twice} twice.")
        axes[key] = [f"{key}={value}" for value in values]
    for point in itertools.product(*axes.values()):
        yield list(point)


def split_values(text: str) -> list[str]:
    """The values between the commas that stand outside of brackets and quotes.

    >>> split_values("[1,2],[3],'a,b'")
    ['[1,2]', '[3]', "'a,b'"]
    """
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return values


def short_keys(keys: Sequence[str]) -> list[str]:
    """Every key by its last name, where that is clear.

    >>> short_keys(["optim.lr", "model.width"])
    ['lr', 'width']
    >>> short_keys(["optim.lr", "optim.task_lr.lr"])
    ['optim.lr', 'optim.task_lr.lr']
    """
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return [key if last.count(name) > 1 else name for key, name in zip(keys, last, strict=True)]


def point_labels(points: Sequence[Sequence[str]]) -> list[str]:
    """A folder name for every point: its values, with keys as short as they are clear.

    It does not depend on the other values, so that a sweep can be widened later.

    >>> point_labels([["optim.lr=1e-3", "balance.method=equal"], ["optim.lr=1e-2", "balance.method=equal"]])
    ['lr=1e-3-method=equal', 'lr=1e-2-method=equal']
    """
    return [_label(point) for point in points]


def _label(point: Sequence[str]) -> str:
    pairs = [override.partition("=") for override in point]
    names = short_keys([key for key, _, _ in pairs])
    text = "-".join(f"{name}={value}" for name, (_, _, value) in zip(names, pairs, strict=True))
    label = re.sub(r"[^\w=.+-]+", "_", text)
    if label == text and len(label) <= _LONGEST_LABEL:
        return label
    # What was replaced or cut off must not make two points one folder.
    return f"{label[:_LONGEST_LABEL]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
