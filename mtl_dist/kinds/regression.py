"""Regression: one real number in a unit; and what all kinds of one number share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mtl_dist.kinds.kind import Label, ScalarKind
from mtl_dist.kinds.vocabulary import Cell, LabelError, Vocabulary, one_value, plain
from mtl_dist.specs import TaskInfo


class NumberKind(ScalarKind):
    """Labels that are one number each; a column holds NaN where there is none.

    A kind derived from it says in `is_label` which numbers are labels, and may leave the rest as it is.
    """

    has_values: ClassVar[bool] = True
    expected: ClassVar[str] = "a number"
    """What a label is, for messages."""

    def is_label(self, value: float) -> bool:
        """Whether a finite number is a label."""
        return True

    def parse(self, cell: Cell, words: Vocabulary) -> Label | None:
        text = plain(one_value(cell))
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not self.is_label(value):
            raise LabelError(
                f"{self.expected} or nothing", repr(text), "Say which words mean none: --missing WORD,..."
            )
        return value

    def column_type(self, info: TaskInfo) -> str:
        return "<f8"

    def encode(self, labels: Sequence[Label | None], info: TaskInfo) -> np.ndarray:
        return np.array([math.nan if label is None else label for label in labels], "<f8")

    def decode(self, value: Any, info: TaskInfo) -> Label:
        return value.item()

    def counts(self, column: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        return (int((~np.isnan(column)).sum()),)

    def facts(self, column: np.ndarray, info: TaskInfo) -> TaskInfo:
        """With mean, standard deviation and range."""
        values = column[~np.isnan(column)]
        if not len(values):
            return info
        deviation = float(values.std())
        return replace(
            info,
            mean=float(values.mean()),
            std=deviation if deviation > 0 else 1.0,  # a target that never varies must not be divided by 0
            minimum=float(values.min()),
            maximum=float(values.max()),
        )

    def targets(self, batch_size: int, info: TaskInfo) -> np.ndarray:
        return np.zeros(batch_size, np.float32)

    def target(self, label: object, info: TaskInfo) -> Any:
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        if is_number and math.isfinite(label) and self.is_label(label):  # type: ignore[arg-type]
            return label
        raise LabelError(self.expected, repr(label))

    def text(self, label: Label, info: TaskInfo) -> str:
        return f"{label:.4g} {info.unit}".rstrip()


class Regression(NumberKind):
    """A label is any finite number."""

    name = "regression"
    help = "A number."
    is_number: ClassVar[bool] = True
    against_cutmix: ClassVar[str] = "a number is not made of an image's parts"
