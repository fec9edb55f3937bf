"""From the cells of a column to labels.

A stream of cells is read twice: first for the terms that it holds (`kind.terms`), from which a `Vocabulary`
is made, then for its labels. `parse_cells` does both for cells that are in memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Label, ScalarKind
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError, plain, vocabulary

_COMMA_NUMBER = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


@dataclass(frozen=True)
class Parsed:
    """What the cells of a column say: class names, the label of each cell or None, and what to report."""

    classes: tuple[str, ...]
    labels: Sequence[Label | None]
    notes: tuple[str, ...] = ()


def parse_cells(
    kind: ScalarKind, cells: Sequence[Cell], where: Callable[[int], str], declared: Declared
) -> Parsed:
    """Class names and the label of each cell, None where it is empty or says so in one of the missing words.

    Raises:
        UserError: a cell that holds no label of the task, `where` says the place of each; or, if `declared`
            is strict, two texts for one class.
    """
    num_empty = sum(isinstance(cell, str) and not plain(cell) for cell in cells)
    cells, missing = _without_missing(cells, declared)
    notes = (
        [f"read as no label: {', '.join(f'{word!r} ({n:,})' for word, n in missing.items())}"]
        if missing
        else []
    )
    if kind.may_be_none and num_empty:
        none = "[]" if any(isinstance(cell, list) for cell in cells) else f"{declared.separator!r} alone"
        notes.append(
            f"empty cells, missing labels and not 'none of the classes', which is {none}: {num_empty:,}"
        )
    at = 0
    try:
        terms: Counter[str] = Counter()
        for at, cell in enumerate(cells):  # noqa: B007 (for the message)
            terms.update(kind.terms(cell, declared))
        words = vocabulary(declared, terms)
        if kind.has_values and any(isinstance(cell, str) and "," in cell for cell in cells):
            cells = _with_points(cells, where)
            notes.append("numbers have a decimal comma")
        labels: list[Label | None] = []
        for at, cell in enumerate(cells):  # noqa: B007
            labels.append(kind.parse(cell, words))
    except LabelError as error:
        if kind.has_values and _are_words(cells):
            raise UserError(
                f"{where(at)}: expected {error.expected}, found {error.found}, and no number anywhere else. "
                "Name another column; where these are classes, --classification or --ordinal takes them."
            ) from None
        raise UserError(f"{where(at)}: {error}") from None
    if terms:
        if declared.strict and (texts := words.merged(terms)):
            raise UserError(
                f"{where(0)}: expected one text for each class, found {' and '.join(map(ascii, texts))} for "
                "one. Write them alike, or leave out --strict."
            )
        notes += words.spellings(terms)
    return Parsed(words.names if kind.has_classes else (), labels, tuple(notes))


def _are_words(cells: Sequence[Cell]) -> bool:
    """Whether several cells are filled, none with a number."""
    filled = [str(cell) for cell in cells if cell]
    return len(filled) > 1 and not any(map(_NUMBER.fullmatch, filled))


def _without_missing(cells: Sequence[Cell], declared: Declared) -> tuple[list[Cell], dict[str, int]]:
    """The cells, empty where one holds a word for "no label"; and how often each such word was found."""
    words = declared.missing_words - {""}
    found: Counter[str] = Counter()
    kept: list[Cell] = []
    for cell in cells:
        text = plain(cell) if isinstance(cell, str) else ""
        if text in words:
            found[text] += 1
        kept.append("" if isinstance(cell, str) and (not text or text in words) else cell)
    return kept, dict(sorted(found.items()))


def _with_points(cells: Sequence[Cell], where: Callable[[int], str]) -> list[Cell]:
    """The cells of numbers with a point in place of a decimal comma.

    Raises:
        UserError: not all cells with a comma are such numbers, others have a point, or every comma may
            as well stand between thousands.
    """
    commas = [at for at, cell in enumerate(cells) if "," in cell]
    points = [at for at, cell in enumerate(cells) if "." in cell]
    for at in commas:
        if not _COMMA_NUMBER.fullmatch(str(cells[at])):
            raise UserError(f"{where(at)}: expected a number or nothing, found {cells[at]!r}.")
    first = commas[0]
    if points:
        raise UserError(
            f"{where(first)}: expected one decimal sign in all cells, found {cells[first]!r} and, in "
            f"{where(points[0])}, {cells[points[0]]!r}. Write all with a point."
        )
    if all(_THOUSANDS.fullmatch(str(cells[at])) for at in commas):
        raise UserError(
            f"{where(first)}: expected a number, found {cells[first]!r}, whose comma may stand before "
            "decimals or between thousands. Write it with a point, or without the comma."
        )
    return [cell.replace(",", ".") if isinstance(cell, str) else cell for cell in cells]
