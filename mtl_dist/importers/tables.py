"""Tables of labels: csv, tsv or json, and what lies beside a `labels.json`, as rows of plain cells."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mtl_dist.errors import UserError
from mtl_dist.importers.sources import Tree
from mtl_dist.kinds.cells import Parsed, parse_cells
from mtl_dist.kinds.registry import scalar_kind
from mtl_dist.kinds.vocabulary import Cell, Declared

_TABLES = (".csv", ".tsv", ".json")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}
FILE, SPLIT, LABEL = "file", "split", "label"
"""The columns that a `labels.json` of file names gives: FILE and LABEL, and SPLIT from `splits.json`."""


@dataclass(frozen=True)
class Row:
    """One row: where it stands, for messages, and its cells by column."""

    where: str
    cells: Mapping[str, Cell]


def read_labels(kind: str, rows: Sequence[Row], column: str, declared: Declared) -> Parsed:
    """Class names and the label of each row, None where its cell is empty; and what to report of them.

    Raises:
        UserError: a cell that holds no label of this kind.
    """
    return parse_cells(
        scalar_kind(kind),
        [row.cells[column] for row in rows],
        lambda at: f"{rows[at].where}, column {column!r}",
        declared,
    )


@dataclass(frozen=True)
class Table:
    """A table of labels: the files it speaks of, its columns and rows, and class names that came with it.

    `folder` is where in `tree` the table lies, with a slash at its end, or nothing; `files` are the paths of
    the table and of what completes it; `notes` say what was found out about its form.
    """

    tree: Tree
    folder: str
    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    classes: Mapping[str, tuple[str, ...]]
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_table(path: Path, root: Path | None) -> Table:
    """The table in a file, or in a directory or zip that holds one; `root` is where its files are.

    A directory or a zip is searched for `labels.json`, then `labels.csv`, then its only table. Without a
    `root` the files are beside the table. A `labels.json` that maps file names to labels is completed by
    `classes.json` (names by index), `splits.json` (file names by split) and `metadata.csv` (more columns,
    by its column `file`) beside it.

    Raises:
        UserError: no table, or one that cannot be understood.
    """
    if not path.exists():
        raise UserError(
            f"{path}: expected a table (csv, tsv or json), a directory or a zip, found nothing there."
        )
    if path.suffix.lower() in _TABLES and path.is_file():
        home, name = Tree(path.parent), path.name
    else:
        home = Tree(path)
        name = _find_table(home)
    where = f"{home}/{name}"
    suffix = PurePosixPath(name).suffix.lower()
    classes: Mapping[str, tuple[str, ...]] = {}
    notes: tuple[str, ...] = ()
    if suffix != ".json":
        usual = "\t" if suffix == ".tsv" else ","
        separator = _separator(home, name, usual)
        columns, rows = _csv_rows(home, name, separator)
        if separator != usual:
            notes = (f"columns of {name} are separated by {_SEPARATORS[separator]}",)
    else:
        content = _json(home, name)
        if isinstance(content, dict):
            columns, rows, classes = _rows_by_file(home, name, content)
        else:
            columns, rows = _json_rows(where, content)
    if not rows:
        raise UserError(f"{where}: expected rows, found none.")
    tree = Tree(root) if root is not None else home
    parent = PurePosixPath(name).parent.as_posix()
    folder = "" if root is not None or parent == "." else f"{parent}/"
    title = path.resolve().parent.name if path.name in ("labels.json", "labels.csv") else path.resolve().stem
    beside = [_beside(name, other) for other in ("splits.json", "metadata.csv", "classes.json")]
    read = [name, *(other for other in beside if suffix == ".json" and home.find(other) is not None)]
    files = tuple(read if home.is_archive else [os.path.normpath(home.root / each) for each in read])
    return Table(tree, folder, title, tuple(columns), rows, classes, files, notes)


def _find_table(home: Tree) -> str:
    tables = [name for name in home.files if PurePosixPath(name).suffix.lower() in _TABLES]
    for wanted in ("labels.json", "labels.csv"):
        named = [name for name in tables if PurePosixPath(name).name == wanted]
        if len(named) == 1:
            return named[0]
    if len(tables) == 1:
        return tables[0]
    found = ", ".join(tables[:5]) or "no csv, tsv or json"
    raise UserError(f"{home}: expected labels.json, labels.csv or a single table in it, found {found}.")


def _read(home: Tree, name: str) -> str:
    try:
        return home.source(name).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{home}/{name}: expected UTF-8 text, found {error}. Save it as UTF-8.") from None


def _separator(home: Tree, name: str, usual: str) -> str:
    """What stands between the columns: the usual, or where the first line lacks it what it holds most of."""
    first = next((line for line in _read(home, name).splitlines() if line.strip()), "")
    if usual in first:
        return usual
    most = max(_SEPARATORS, key=first.count)
    return most if most in first else usual


def _csv_rows(home: Tree, name: str, delimiter: str) -> tuple[list[str], list[Row]]:
    where = f"{home}/{name}"
    reader = csv.reader(io.StringIO(_read(home, name), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        columns = [column.strip() for column in next(reader, [])]
        repeated = [column for i, column in enumerate(columns) if column in columns[:i]]
        if repeated:
            raise UserError(f"{where}: expected one column of each name, found {repeated[0]!r} twice.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{where} line {reader.line_num}: expected {len(columns)} cells as in the first line, "
                    f"found {len(cells)}. Quote cells that hold a {delimiter!r}."
                )
            values = {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
            rows.append(Row(f"{where} line {reader.line_num}", values))
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num}: expected a table, found: {error}.") from None
    return columns, rows


def _json(home: Tree, name: str) -> Any:
    where = f"{home}/{name}"

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(names) if key in names[:i])
            raise UserError(f"{where}: expected each name once, found {twice!r} twice.")
        return found

    try:
        return json.loads(
            _read(home, name), object_pairs_hook=refuse_repeated, parse_float=str, parse_constant=str
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: expected JSON, found: {error}.") from None


def _json_rows(where: str, content: Any) -> tuple[list[str], list[Row]]:
    """The rows of a list of objects; a column that an object lacks is a missing cell."""
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UserError(f"{where}: expected a list of objects, or an object of labels by file name.")
    columns = list(dict.fromkeys(column for item in content for column in item))
    rows = []
    for number, item in enumerate(content, start=1):
        place = f"{where} item {number}"
        rows.append(Row(place, {column: _cell(place, item.get(column)) for column in columns}))
    return columns, rows


def _cell(where: str, value: Any) -> Cell:
    if value is None:
        return ""
    if isinstance(value, list):
        return [str(_cell(where, item)) for item in value]
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str | int):
        return str(value).strip()
    raise UserError(f"{where}: expected text, a number or a list, found {value!r}.")


def _rows_by_file(
    home: Tree, name: str, content: dict[str, Any]
) -> tuple[list[str], list[Row], dict[str, tuple[str, ...]]]:
    """The table of a `labels.json`, completed by what lies beside it."""
    where = f"{home}/{name}"
    items = [
        {FILE: file, **(label if isinstance(label, dict) else {LABEL: label})}
        for file, label in content.items()
    ]
    columns, rows = _json_rows(where, items)
    split_of = _splits_by_file(home, _beside(name, "splits.json"))
    if split_of and SPLIT not in columns:
        columns.append(SPLIT)
        rows = [Row(row.where, {**row.cells, SPLIT: split_of.get(str(row.cells[FILE]), "")}) for row in rows]
    columns, rows = _with_metadata(home, _beside(name, "metadata.csv"), columns, rows)
    return columns, rows, _class_names(home, _beside(name, "classes.json"))


def _beside(name: str, other: str) -> str:
    return str(PurePosixPath(name).with_name(other))


def _splits_by_file(home: Tree, name: str) -> dict[str, str]:
    """The split of each file, from file names by split or from the split by file name."""
    if home.find(name) is None:
        return {}
    content = _json(home, name)
    if isinstance(content, dict) and all(isinstance(value, str) for value in content.values()):
        return content
    if not isinstance(content, dict) or not all(isinstance(value, list) for value in content.values()):
        raise UserError(f"{home}/{name}: expected an object of lists of file names by split.")
    split_of: dict[str, str] = {}
    for split, files in content.items():
        for file in files:
            if split_of.setdefault(file, split) != split:
                raise UserError(f"{home}/{name}: expected each file in one split, found {file!r} in two.")
    return split_of


def _class_names(home: Tree, name: str) -> dict[str, tuple[str, ...]]:
    """The names of the classes of the column LABEL: a list, names by index, or indices by name."""
    if home.find(name) is None:
        return {}
    content = _json(home, name)
    if isinstance(content, dict):
        pairs = [
            (str(value), key) if isinstance(value, int) else (key, value) for key, value in content.items()
        ]
        by_index = dict(pairs)
        content = [by_index.get(str(index)) for index in range(len(pairs))]
    if not isinstance(content, list) or not all(isinstance(class_name, str) for class_name in content):
        raise UserError(f"{home}/{name}: expected a list of class names, or names by index from 0 on.")
    return {LABEL: tuple(content)}


def _with_metadata(home: Tree, name: str, columns: list[str], rows: list[Row]) -> tuple[list[str], list[Row]]:
    """The rows with the further columns of `metadata.csv`, if there is one with a column FILE."""
    if home.find(name) is None:
        return columns, rows
    more_columns, more_rows = _csv_rows(home, name, _separator(home, name, ","))
    if FILE not in more_columns:
        return columns, rows
    new = [column for column in more_columns if column not in columns]
    by_file = {row.cells[FILE]: row.cells for row in more_rows}
    empty = dict.fromkeys(new, "")
    completed = []
    for row in rows:
        cells = by_file.get(str(row.cells[FILE]), empty)
        completed.append(Row(row.where, {**row.cells, **{column: cells[column] for column in new}}))
    return columns + new, completed
