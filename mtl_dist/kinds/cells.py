"""From the cells of a column to labels.

A stream of cells is read twice where no classes are declared: first for the terms that it holds
(`kind.terms`), from which a `Vocabulary` is made, then for its labels. `parse_cells` does both for cells that
are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Label, ScalarKind
from mtl_dist.kinds.words import Cell, Declared, LabelError, vocabulary


def parse_cells(
    kind: ScalarKind, cells: Sequence[Cell], where: Callable[[int], str], declared: Declared
) -> tuple[tuple[str, ...], list[Label | None]]:
    """Class names and the label of each cell, None where it is empty.

    Raises:
        UserError: a cell that holds no label of the task; `where` says the place of each.
    """
    at = 0
    try:
        terms: list[str] = []
        for at, cell in enumerate(cells):  # noqa: B007 (for the message)
            terms += kind.terms(cell, declared)
        words = vocabulary(declared, terms)
        labels: list[Label | None] = []
        for at, cell in enumerate(cells):  # noqa: B007
            labels.append(kind.parse(cell, words))
    except LabelError as error:
        raise UserError(f"{where(at)}: {error}") from None
    return words.names if kind.has_classes else (), labels
