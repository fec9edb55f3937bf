"""From the cells of a column to labels: class indices, sets of classes, values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from mtl_dist.errors import UserError
from mtl_dist.importers.splitting import class_order
from mtl_dist.importers.tables import Cell, Row

ClassNames = Sequence[str] | Mapping[int, str]
"""The classes of a task: their names by index, or by the value that stands for them in the data."""


def names_of(classes: ClassNames) -> tuple[str, ...]:
    """The names by index; classes by value come in the order in which they are stated."""
    return tuple(classes.values()) if isinstance(classes, Mapping) else tuple(classes)


def classification_labels(
    column: str, rows: Sequence[Row], classes: ClassNames | None
) -> tuple[tuple[str, ...], list[int | None]]:
    """Class names and each row's class index, None where the cell is empty.

    A cell holds a class's name, or a number: the value of a class, or its index where only names are known.
    Without `classes` the cells themselves are the names, ordered by number where all are numbers.

    Raises:
        UserError: a cell that is no class.
    """
    texts = [_single(row, column) for row in rows]
    names, index_of = _lookup([text for text in texts if text], classes)
    return names, [_index(row, column, text, names, index_of) for row, text in zip(rows, texts, strict=True)]


def multilabel_labels(
    column: str, rows: Sequence[Row], classes: ClassNames | None, separator: str
) -> tuple[tuple[str, ...], list[list[int] | None]]:
    """Class names and each row's positive classes, None where the cell is empty.

    A cell holds classes with `separator` between them; the separator alone means none of them. A list in
    JSON is taken as it is.

    Raises:
        UserError: a cell that names something that is no class.
    """
    cells = [row.cells[column] for row in rows]
    members = [_members(cell, separator) for cell in cells]
    names, index_of = _lookup([text for texts in members if texts for text in texts], classes)
    labels: list[list[int] | None] = []
    for row, texts in zip(rows, members, strict=True):
        if texts is None:
            labels.append(None)
        else:
            found = {_index(row, column, text, names, index_of) for text in texts}
            labels.append(sorted(index for index in found if index is not None))
    return names, labels


def regression_labels(column: str, rows: Sequence[Row]) -> list[float | None]:
    """Each row's value, None where the cell is empty or "nan".

    Raises:
        UserError: a cell that is no finite number.
    """
    labels: list[float | None] = []
    for row in rows:
        text = _single(row, column)
        try:
            value = float(text) if text else math.nan
        except ValueError:
            value = math.inf
        if math.isinf(value):
            raise UserError(f"{row.where}, column {column!r}: expected a number or nothing, found {text!r}.")
        labels.append(None if math.isnan(value) else value)
    return labels


def _single(row: Row, column: str) -> str:
    cell = row.cells[column]
    if isinstance(cell, list):
        raise UserError(f"{row.where}, column {column!r}: expected one value, found the list {cell}.")
    return cell


def _members(cell: Cell, separator: str) -> list[str] | None:
    if isinstance(cell, list):
        return cell
    if not cell:
        return None
    return [text.strip() for text in cell.split(separator) if text.strip()]


def _integer(text: str) -> int | None:
    """The whole number in a cell; "3.0" is one: a column with gaps is often written so."""
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def _lookup(texts: Iterable[str], classes: ClassNames | None) -> tuple[tuple[str, ...], dict[str | int, int]]:
    """Class names, and the index for each way to say a class: its name, and a number."""
    if classes is None:
        unique = set(texts)
        numbers = {text: _integer(text) for text in unique}
        if all(number is not None for number in numbers.values()):
            names = tuple(class_order(str(number) for number in numbers.values()))
            return names, {int(name): index for index, name in enumerate(names)}
        names = tuple(class_order(unique))
        return names, {name: index for index, name in enumerate(names)}
    names = names_of(classes)
    values = list(classes) if isinstance(classes, Mapping) else range(len(names))
    index_of: dict[str | int, int] = {value: index for index, value in enumerate(values)}
    return names, index_of | {name: index for index, name in enumerate(names)}


def _index(
    row: Row, column: str, text: str, names: Sequence[str], index_of: Mapping[str | int, int]
) -> int | None:
    if not text:
        return None
    number = _integer(text)
    if text in index_of:
        return index_of[text]
    if number is not None and number in index_of:
        return index_of[number]
    where = f"{row.where}, column {column!r}"
    if number is not None:
        numbers = sorted(value for value in index_of if isinstance(value, int))
        raise UserError(
            f"{where}: expected a class index from {numbers[0]} to {numbers[-1]} ({', '.join(names)}), "
            f"found {text}."
        )
    nearest = difflib.get_close_matches(text, names, 1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"{where}: expected a class of {', '.join(names)}, found {text!r}.{hint}")
