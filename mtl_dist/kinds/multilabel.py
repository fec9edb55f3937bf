"""Multilabel: any number of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mtl_dist.kinds.classification import class_index, up_to_last
from mtl_dist.kinds.kind import Label, ScalarKind
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError, Vocabulary
from mtl_dist.specs import TaskInfo


class Multilabel(ScalarKind):
    """A label is the ascending list of the classes that apply; a column holds a bit for each class.

    A column does not distinguish a label without a class from a missing one: the index does.
    """

    name = "multilabel"
    help = "Any number of classes, a separator between them; it alone means none, an empty cell no label."
    has_classes: ClassVar[bool] = True
    may_be_none: ClassVar[bool] = True

    def terms(self, cell: Cell, declared: Declared) -> list[str]:
        return _members(cell, declared.separator) or []

    def parse(self, cell: Cell, words: Vocabulary) -> Label | None:
        texts = _members(cell, words.separator)
        return None if texts is None else sorted({words.index(text) for text in texts if text})

    def column_type(self, info: TaskInfo) -> tuple[str, tuple[int, ...]]:
        return "u1", (_num_bytes(info),)

    def encode(self, labels: Sequence[Label | None], info: TaskInfo) -> np.ndarray:
        flags = np.zeros((len(labels), 8 * _num_bytes(info)), np.uint8)
        for flag, positives in zip(flags, labels, strict=True):
            flag[positives or []] = 1
        return np.packbits(flags, axis=1, bitorder="little")

    def decode(self, value: Any, info: TaskInfo) -> Label:
        return np.flatnonzero(np.unpackbits(value, bitorder="little")).tolist()

    def label_of(self, target: Any, info: TaskInfo) -> Label:
        return np.flatnonzero(target >= 0.5).tolist()

    def counts(self, column: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        return up_to_last(np.unpackbits(column, axis=1, bitorder="little").sum(axis=0), info)

    def targets(self, batch_size: int, info: TaskInfo) -> np.ndarray:
        return np.zeros((batch_size, len(info.classes)), np.float32)

    def target(self, label: object, info: TaskInfo) -> Any:
        if not isinstance(label, list):
            raise LabelError("a list of class indices", repr(label))
        row = np.zeros(len(info.classes), np.float32)
        row[[class_index(index, info) for index in label]] = 1
        return row

    def text(self, label: Label, info: TaskInfo) -> str:
        return ", ".join(info.classes[index] for index in label) or "none"


def _members(cell: Cell, separator: str) -> list[str] | None:
    if isinstance(cell, list):
        return cell
    if not cell:
        return None
    return [text.strip() for text in cell.split(separator) if text.strip()]


def _num_bytes(info: TaskInfo) -> int:
    return -(-len(info.classes) // 8)
