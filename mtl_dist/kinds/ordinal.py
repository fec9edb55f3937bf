"""Ordinal: a grade, one of several classes that have an order."""

from __future__ import annotations

from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError, one_value, whole_number


class Ordinal(Classification):
    """A label is the index of a grade, from the lowest on.

    Grades that are whole numbers have their order; others have that in which their names are declared.
    """

    name = "ordinal"
    help = "A grade: one class of several in their order, a whole number or, with --classes, a name."

    def terms(self, cell: Cell, declared: Declared) -> list[str]:
        text = one_value(cell)
        if text and declared.classes is None and whole_number(text) is None:
            raise LabelError(
                "a whole number as grade",
                repr(text),
                "Name grades from low to high: --classes TASK=LOW,MID,HIGH.",
            )
        return super().terms(cell, declared)
