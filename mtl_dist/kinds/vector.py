"""Vector: several numbers with names, each of which may be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mtl_dist.kinds.kind import Label, ScalarKind
from mtl_dist.kinds.moments import deviation, moments_of, pooled
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError, Vocabulary, plain
from mtl_dist.specs import TaskInfo

_COUNTED = ("labels", "mean", "std", "minimum", "maximum")
"""The facts of each number, a list in the order of their names."""


class Vector(ScalarKind):
    """A label is a list of K numbers in the order of their names (`TaskInfo.classes`), None for one missing.

    `TaskInfo.unit` is that of all, or has one for each with commas between. A column, and a target, holds NaN
    for what is missing.
    """

    name = "vector"
    help = "Several numbers with names: a column of each, or one of lists."
    metavar: ClassVar[str] = "TASK=COLUMN,..."
    has_classes: ClassVar[bool] = True
    class_words: ClassVar[tuple[str, str]] = ("number", "numbers")
    against_cutmix: ClassVar[str] = "numbers are not made of an image's parts"
    shared_facts: ClassVar[tuple[str, ...]] = ()

    # ---- from cells
    def cell_columns(self, text: str, columns: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A column of each number, which also name them; or one of lists."""
        parts = tuple(part.strip() for part in text.split(","))
        return (parts, parts) if len(parts) > 1 else (parts, ())

    def declare(self, task: str, declared: Declared) -> TaskInfo:
        info = super().declare(task, declared)
        units = info.unit.split(",")
        if len(units) > 1 and info.classes and len(units) != len(info.classes):
            raise LabelError(
                f"one unit, or one for each of {', '.join(info.classes)}", repr(info.unit), "Correct --unit."
            )
        return info

    def terms(self, cell: Cell, declared: Declared) -> list[str]:
        """The numbers' places, from 1 on, where they have no names."""
        if declared.classes is not None:
            return []
        return [str(number) for number in range(1, len(_texts(cell, declared.separator)) + 1)]

    def parse(self, cell: Cell, words: Vocabulary) -> Label | None:
        texts = _texts(cell, words.separator)
        values = [_value(text) for text in texts]
        if all(value is None for value in values):
            return None
        if len(values) != len(words.names):
            raise LabelError(
                f"{len(words.names)} numbers ({', '.join(words.names)})",
                f"{len(values)}",
                "A number that is missing is an empty cell, or null in a list.",
            )
        return values

    # ---- stored
    def column_type(self, info: TaskInfo) -> tuple[str, tuple[int, ...]]:
        return "<f8", (len(info.classes),)

    def encode(self, labels: Sequence[Label | None], info: TaskInfo) -> np.ndarray:
        column = np.full((len(labels), len(info.classes)), math.nan, "<f8")
        for row, label in zip(column, labels, strict=True):
            if label is not None:
                row[:] = [math.nan if value is None else value for value in label]
        return column

    def decode(self, value: Any, info: TaskInfo) -> Label:
        return [None if math.isnan(number) else number for number in value.tolist()]

    def counts(self, column: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        """How often each number is there."""
        return tuple((~np.isnan(column)).sum(axis=0).tolist())

    def facts(self, column: np.ndarray, info: TaskInfo) -> TaskInfo:
        """With number, mean, deviation and range of the labels of each number."""
        return _with_moments(info, [moments_of(values) for values in column.T])

    def merge(self, task_infos: Sequence[TaskInfo]) -> TaskInfo:
        """Each number pooled over all."""
        first, *others = task_infos
        moments = _moments(first)
        for info in others:
            moments = [pooled(one, other) for one, other in zip(moments, _moments(info), strict=True)]
        return _with_moments(first, moments) if others else first

    def numbers(self, info: TaskInfo) -> dict[str, TaskInfo]:
        found = {}
        for at, (name, unit) in enumerate(zip(info.classes, units_of(info), strict=True)):
            own = {key: info.facts[key][at] for key in _COUNTED if key in info.facts}
            num_labelled = own.pop("labels", 0)
            found[name] = TaskInfo(self.name, (), num_labelled, unit=unit, **own)
        return found

    # ---- in a batch
    def targets(self, batch_size: int, info: TaskInfo) -> np.ndarray:
        return np.full((batch_size, len(info.classes)), math.nan, np.float32)

    def target(self, label: object, info: TaskInfo) -> Any:
        expected = f"a list of {len(info.classes)} numbers or nulls"
        if not isinstance(label, list) or len(label) != len(info.classes):
            raise LabelError(expected, repr(label))
        for value in label:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and math.isfinite(value)):
                raise LabelError(expected, repr(label))
        return np.array([math.nan if value is None else value for value in label], np.float32)

    # ---- shown
    def text(self, label: Label, info: TaskInfo) -> str:
        shown = [
            f"{name} {value:.4g} {unit}".rstrip() if value is not None else f"{name} -"
            for name, value, unit in zip(info.classes, label, units_of(info), strict=True)
        ]
        return ", ".join(shown)


def units_of(info: TaskInfo) -> tuple[str, ...]:
    """The unit of each number."""
    stated = tuple(unit.strip() for unit in info.unit.split(","))
    return stated if len(stated) == len(info.classes) else stated[:1] * len(info.classes)


def _texts(cell: Cell, separator: str) -> list[str]:
    """The numbers in a cell: a list, one as JSON has it, or texts with separators or space between."""
    if isinstance(cell, list):
        return [plain(text) for text in cell]
    text = plain(cell)
    if text.startswith("["):
        try:
            found = json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
        except ValueError:
            found = None
        if not isinstance(found, list) or any(isinstance(each, list | dict | bool) for each in found):
            raise LabelError("a list of numbers", repr(text))
        return ["" if each is None else plain(each) for each in found]
    if separator in text:
        return [plain(part) for part in text.split(separator)]
    return text.split()


def _value(text: str) -> float | None:
    """A number; None of nothing, or of what JSON and tables call a number that is none."""
    if text in ("", "null", "NaN", "nan", "NA"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LabelError("finite numbers, or nothing for one that is missing", repr(text))
    return value


def _moments(info: TaskInfo) -> list[np.ndarray]:
    """The moments of each number's labels, as `moments` has them."""
    found = zip(*(info.facts[key] for key in _COUNTED), strict=True)
    return [
        np.array([num, mean, num * std**2, low, high] if num else [0, 0, 0, math.inf, -math.inf])
        for num, mean, std, low, high in found
    ]


def _with_moments(info: TaskInfo, moments: Sequence[np.ndarray]) -> TaskInfo:
    counted = {
        "labels": [int(each[0]) for each in moments],
        "mean": [float(each[1]) for each in moments],
        "std": [deviation(each) for each in moments],
        "minimum": [float(each[3]) if each[0] else 0.0 for each in moments],
        "maximum": [float(each[4]) if each[0] else 0.0 for each in moments],
    }
    return replace(info, facts={**info.facts, **counted})
