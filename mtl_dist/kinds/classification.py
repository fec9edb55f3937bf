"""Classification: one class of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtl_dist.kinds.kind import Blending, Label, ScalarKind
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError, Vocabulary, one_value
from mtl_dist.specs import NO_CLASS, TaskInfo


class Classification(ScalarKind):
    """A label is the index of a class; a column holds -1 where there is none."""

    name = "classification"
    help = "One class of several: its name, its index, or the value that stands for it."
    has_classes: ClassVar[bool] = True
    is_one_class: ClassVar[bool] = True
    blending: ClassVar[Blending] = "partner"

    def terms(self, cell: Cell, declared: Declared) -> list[str]:
        text = one_value(cell)
        return [text] if text else []

    def parse(self, cell: Cell, words: Vocabulary) -> Label | None:
        text = one_value(cell)
        return words.index(text) if text else None

    def column_type(self, info: TaskInfo) -> str:
        return "<i4"

    def encode(self, labels: Sequence[Label | None], info: TaskInfo) -> np.ndarray:
        return np.array([NO_CLASS if label is None else label for label in labels], "<i4")

    def decode(self, value: Any, info: TaskInfo) -> Label:
        return value.item()

    def counts(self, column: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        counts = np.bincount(column[column != NO_CLASS].astype(np.uint32), minlength=len(info.classes))
        return up_to_last(counts, info)

    def targets(self, batch_size: int, info: TaskInfo) -> np.ndarray:
        return np.zeros(batch_size, np.int64)

    def target(self, label: object, info: TaskInfo) -> Any:
        return class_index(label, info)

    def text(self, label: Label, info: TaskInfo) -> str:
        return info.classes[label]


def class_index(label: object, info: TaskInfo) -> int:
    """A stored class index.

    Raises:
        LabelError: it is none of the task's.
    """
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(info.classes):
        raise LabelError(f"a class from 0 to {len(info.classes) - 1}", repr(label))
    return label


def up_to_last(counts: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
    """The counts of the task's classes; whatever is beyond them stays, so that it shows."""
    return tuple(counts.tolist()[: max(len(info.classes), 1 + int(np.flatnonzero(counts).max(initial=-1)))])
