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
        """With mean, standard deviation and range; of positive numbers also mean and deviation of their
        logarithms (`log_mean`, `log_std`)."""
        values = column[~np.isnan(column)]
        if not len(values):
            return info
        of_logarithms = {}
        if values.min() > 0:
            logarithms = np.log(values)
            of_logarithms = {"log_mean": float(logarithms.mean()), "log_std": _apart(logarithms)}
        return replace(
            info,
            mean=float(values.mean()),
            std=_apart(values),
            minimum=float(values.min()),
            maximum=float(values.max()),
            facts={**info.facts, **of_logarithms},
        )

    def merge(self, task_infos: Sequence[TaskInfo]) -> TaskInfo:
        """Pooled; the logarithms where all datasets have them."""
        merged = super().merge(task_infos)
        if len(task_infos) == 1:
            return merged
        facts = {key: value for key, value in merged.facts.items() if key not in ("log_mean", "log_std")}
        if all("log_mean" in info.facts for info in task_infos):
            of_logarithms = super().merge(
                [replace(i, mean=i.facts["log_mean"], std=i.facts["log_std"]) for i in task_infos]
            )
            facts |= {"log_mean": of_logarithms.mean, "log_std": of_logarithms.std}
        return replace(merged, facts=facts)

    def targets(self, batch_size: int, info: TaskInfo) -> np.ndarray:
        return np.zeros(batch_size, np.float32)

    def target(self, label: object, info: TaskInfo) -> Any:
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        if is_number and math.isfinite(label) and self.is_label(label):  # type: ignore[arg-type]
            return label
        raise LabelError(self.expected, repr(label))

    def text(self, label: Label, info: TaskInfo) -> str:
        return f"{label:.4g} {info.unit}".rstrip()


def _apart(values: np.ndarray) -> float:
    """The standard deviation; 1 of values that do not vary: a target must not be divided by 0."""
    deviation = float(values.std())
    return deviation if deviation > 0 else 1.0


class Regression(NumberKind):
    """A label is any finite number."""

    name = "regression"
    help = "A number."
    is_number: ClassVar[bool] = True
    against_cutmix: ClassVar[str] = "a number is not made of an image's parts"
