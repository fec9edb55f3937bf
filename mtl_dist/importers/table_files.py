"""Tables of labels: csv, tsv, json or a plain list, and what completes a `labels.json`, as rows of cells."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mtl_dist.errors import UserError
from mtl_dist.importers.finding import FileFinder
from mtl_dist.importers.lists import (
    COMMENT,
    LISTS,
    Line,
    column_names,
    looks_like_a_file,
    read_list,
    text_of,
)
from mtl_dist.importers.sources import Tree
from mtl_dist.importers.split_columns import SPLIT
from mtl_dist.importers.splitting import is_split_word
from mtl_dist.importers.summary import listed
from mtl_dist.kinds.cells import Parsed, parse_cells
from mtl_dist.kinds.registry import scalar_kind
from mtl_dist.kinds.vocabulary import Cell, Declared

TABLES = (".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson")
_FORMS = "csv, tsv, json, jsonl or a list as txt"
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}
BLANKS = " "
"""In place of a separator: the cells of a line are separated by any number of blanks."""
METADATA, FILE_NAME = "metadata", "file_name"
"""The table in a folder of images of Hugging Face's imagefolder, and its column of them."""
FILE, LABEL = "file", "label"
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

    `home` is where the table is, `tree` where its files are, and `folder` where in `tree` the table is, with
    a slash at its end, or nothing; `files` are the paths of the table and of what completes it; `notes` say
    what was found out about its form. `short` are the rows (by `where`) that had fewer cells than there are
    columns, `left_out` the lines that are no rows, and why.
    """

    home: Tree
    tree: Tree
    folder: str
    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    classes: Mapping[str, tuple[str, ...]]
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    short: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Read:
    """One file of a table as it was read."""

    columns: list[str]
    rows: list[Row]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    short: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)


def read_table(path: Path, root: Path | None) -> Table:
    """The table in a file, or in a directory or zip that holds one; `root` is where its files are.

    A directory or a zip is searched for `labels.json`, then `labels.csv`, then its only table, then tables
    or lists called as splits (train.txt, val.txt), which are read as one. Without a `root` the files are
    beside the table. A `labels.json` that maps file names to labels is completed by `classes.json` (names by
    index), `splits.json` (file names by split) and `metadata.csv` (more columns, by its column `file`)
    beside it.

    Raises:
        UserError: no table, or one that cannot be understood.
    """
    if not path.exists():
        raise UserError(f"{path}: expected a table ({_FORMS}), a directory or a zip, found nothing there.")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (*TABLES, *LISTS):
        home, names = Tree(path.parent), [path.name]
    elif path.is_file() and suffix != ".zip":
        raise UserError(
            f"{path}: expected a table ({_FORMS}), a directory or a zip, found a file {suffix!r}."
        )
    else:
        home = Tree(path)
        names = _find_tables(home)
    tree = Tree(root) if root is not None else home
    parent = PurePosixPath(names[0]).parent.as_posix() if len(names) == 1 else "."
    folder = "" if root is not None or parent == "." else f"{parent}/"
    finder = FileFinder(tree, folder)
    found = [_read_file(home, name, finder) for name in names]
    read = found[0] if len(found) == 1 else _joined(names, found)
    if not read.rows:
        raise UserError(f"{home}/{names[0]}: expected rows, found none.")
    title = path.resolve().parent.name if path.name in ("labels.json", "labels.csv") else path.resolve().stem
    files = list(names)
    if PurePosixPath(names[0]).suffix.lower() == ".json":
        beside = [_beside(names[0], other) for other in ("splits.json", "metadata.csv", "classes.json")]
        files += [other for other in beside if home.find(other) is not None]
    paths = tuple(files if home.is_archive else [os.path.normpath(home.root / each) for each in files])
    return Table(
        home,
        tree,
        folder,
        title,
        tuple(read.columns),
        read.rows,
        read.classes,
        paths,
        tuple(read.notes),
        frozenset(read.short),
        read.left_out,
    )


def _read_file(home: Tree, name: str, finder: FileFinder) -> _Read:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in LISTS:
        return _list_rows(home, name, finder)
    if suffix in (".json", ".jsonl", ".ndjson"):
        content = _json(home, name) if suffix == ".json" else _json_lines(home, name)
        if isinstance(content, dict):
            columns, rows, classes = _rows_by_file(home, name, content)
            return _Read(columns, rows, classes)
        return _Read(*_json_rows(f"{home}/{name}", content))
    usual = "\t" if suffix in (".tsv", ".tab") else ","
    separator = _separator(home, name, usual)
    if separator == BLANKS:
        return _list_rows(home, name, finder)
    read = _csv_rows(home, name, separator)
    if separator != usual:
        read.notes.append(f"columns of {name} are separated by {_SEPARATORS[separator]}")
    return read


def _joined(names: Sequence[str], found: Sequence[_Read]) -> _Read:
    """Tables called as splits, or in folders of splits, as one with a column of them."""
    columns = list(dict.fromkeys(column for read in found for column in read.columns))
    stated = SPLIT in columns
    joined = _Read(columns if stated else [*columns, SPLIT], [])
    of_folders = _are_of_folders(names)
    for name, read in zip(names, found, strict=True):
        path = PurePosixPath(name)
        split = {} if stated else {SPLIT: path.parent.name if of_folders else path.stem}
        empty = dict.fromkeys(columns, "")
        for row in read.rows:
            cells = {**empty, **row.cells, **split}
            if path.stem == METADATA and isinstance(cells.get(FILE_NAME), str):
                cells[FILE_NAME] = f"{path.parent}/{cells[FILE_NAME]}"
            joined.rows.append(Row(row.where, cells))
        joined.notes += read.notes
        joined.short |= read.short
        joined.left_out |= read.left_out
        lacking = [column for column in columns if column not in read.columns]
        if lacking:
            joined.notes.append(f"{name} lacks the columns {', '.join(lacking)}: no labels there")
    joined.notes.append(f"splits taken from the tables {', '.join(names)}")
    return joined


def check_whole_lines(short: Collection[str], columns: Sequence[str]) -> None:
    """Refuse a table with lines of fewer cells than columns.

    Raises:
        UserError: with the first.
    """
    if short:
        raise UserError(f"{min(short)}: expected {len(columns)} cells as in the first line, found fewer.")


def _find_tables(home: Tree) -> list[str]:
    """The table in a directory or an archive, or the several that are called as splits."""
    tables = [name for name in home.files if PurePosixPath(name).suffix.lower() in TABLES]
    for wanted in ("labels.json", "labels.csv"):
        named = [name for name in tables if PurePosixPath(name).name == wanted]
        if len(named) == 1:
            return named
    if len(tables) == 1:
        return tables
    metadata = [name for name in tables if PurePosixPath(name).stem == METADATA]
    for candidates in (metadata, tables):
        if _are_of_folders(candidates):
            return candidates
    lists = [name for name in home.files if PurePosixPath(name).suffix.lower() in LISTS]
    for candidates in (tables, lists):
        of_splits = [name for name in candidates if is_split_word(PurePosixPath(name).stem)]
        if len({PurePosixPath(name).parent for name in of_splits}) == 1 and len(of_splits) > 1:
            return of_splits
    found = listed(tables) or f"no csv, tsv or json{' (lists: ' + listed(lists) + ')' if lists else ''}"
    raise UserError(
        f"{home}: expected labels.json, labels.csv, a single table in it, or lists train.txt and val.txt, "
        f"found {found}. Name the table itself, and its files' folder with --root."
    )


def _are_of_folders(names: Sequence[str]) -> bool:
    """Whether these are one table in each folder of a split, all of one name."""
    paths = [PurePosixPath(name) for name in names]
    same = len(paths) > 1 and len({path.name for path in paths}) == 1
    return same and all(is_split_word(path.parent.name) for path in paths)


def _separator(home: Tree, name: str, usual: str) -> str:
    """What stands between the columns: the usual, or where the first line lacks it what it holds most of."""
    lines = [line for line in text_of(home, name).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if len(first) == len("sep=") + 1 and first.lower().startswith("sep=") and first[-1] in _SEPARATORS:
        return first[-1]
    if usual in first:
        return usual
    most = max(_SEPARATORS, key=first.count)
    if most in first:
        return most
    widths = {len(line.split()) for line in lines}
    return BLANKS if len(widths) == 1 and widths.pop() > 1 else usual


def _csv_rows(home: Tree, name: str, delimiter: str) -> _Read:
    where = f"{home}/{name}"
    reader = csv.reader(io.StringIO(text_of(home, name), newline=""), delimiter=delimiter, strict=True)
    read = _Read([], [])
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
        if lines and len(lines) > 1 and lines[0][1][0].lower() == "sep=":  # what a spreadsheet puts before
            lines.pop(0)
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num}: expected a table, found: {error}.") from None
    while len(lines) > 1 and lines[0][1][0].startswith("#") and len(lines[0][1]) != len(lines[1][1]):
        read.left_out[f"{where} line {lines.pop(0)[0]}"] = COMMENT
    if lines and any(map(looks_like_a_file, lines[0][1])):
        read.columns = column_names(
            [Line(number, tuple(cells)) for number, cells in lines], looks_like_a_file, FILE, LABEL
        )
        read.notes.append(f"{name} has no line of column names: {', '.join(read.columns)}")
    elif lines:
        read.columns = lines.pop(0)[1]
    repeated = [column for i, column in enumerate(read.columns) if column in read.columns[:i]]
    if repeated:
        raise UserError(f"{where}: expected one column of each name, found {repeated[0]!r} twice.")
    for number, cells in lines:
        while len(cells) > len(read.columns) and not cells[-1]:
            cells.pop()
        if len(cells) > len(read.columns):
            raise UserError(
                f"{where} line {number}: expected {len(read.columns)} cells as in the first line, "
                f"found {len(cells)}. Quote cells that hold a {delimiter!r}."
            )
        _add(read, where, number, cells)
    return read


def _list_rows(home: Tree, name: str, finder: FileFinder) -> _Read:
    """The rows of a plain list, whose columns may have no names."""
    where = f"{home}/{name}"

    plain = read_list(text_of(home, name), where, finder.holds)
    columns = list(plain.columns)
    read = _Read(columns, [])
    read.left_out |= {f"{where} line {number}": COMMENT for number in plain.comments}
    if plain.lines and not columns:
        columns += column_names(plain.lines, finder.holds, FILE, LABEL)
        read.notes.append(f"{name} has no line of column names: {', '.join(columns)}")
    if len(columns) > 1:
        read.notes.append(f"columns of {name} are separated by {plain.separator}")
    for line in plain.lines:
        _add(read, where, line.number, line.cells)
    return read


def _add(read: _Read, where: str, number: int, cells: Sequence[str]) -> None:
    """Add a row, whose last cells are empty where it is short."""
    place = f"{where} line {number}"
    if len(cells) < len(read.columns):
        read.short.add(place)
        cells = [*cells, *[""] * (len(read.columns) - len(cells))]
    read.rows.append(Row(place, dict(zip(read.columns, cells, strict=True))))


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
            text_of(home, name), object_pairs_hook=refuse_repeated, parse_float=str, parse_constant=str
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: expected JSON, found: {error}.") from None


def _json_lines(home: Tree, name: str) -> list[Any]:
    """The values of a file with one in each line."""
    found = []
    for number, line in enumerate(text_of(home, name).splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line, parse_float=str, parse_constant=str))
            except json.JSONDecodeError as error:
                raise UserError(f"{home}/{name} line {number}: expected JSON, found: {error}.") from None
    return found


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
    names: dict[str, tuple[str, ...]] = {}
    if content.keys() == {"classes", "labels"} and isinstance(content["labels"], dict):  # as FiftyOne has it
        names, content = _names_in(where, content["classes"]), content["labels"]
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
    return columns, rows, names or _class_names(home, _beside(name, "classes.json"))


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
    return _names_in(f"{home}/{name}", _json(home, name))


def _names_in(where: str, content: Any) -> dict[str, tuple[str, ...]]:
    if isinstance(content, dict):
        pairs = [
            (str(value), key) if isinstance(value, int) else (key, value) for key, value in content.items()
        ]
        by_index = dict(pairs)
        content = [by_index.get(str(index)) for index in range(len(pairs))]
    if not isinstance(content, list) or not all(isinstance(class_name, str) for class_name in content):
        raise UserError(f"{where}: expected a list of class names, or names by index from 0 on.")
    return {LABEL: tuple(content)}


def _with_metadata(home: Tree, name: str, columns: list[str], rows: list[Row]) -> tuple[list[str], list[Row]]:
    """The rows with the further columns of `metadata.csv`, if there is one with a column FILE."""
    if home.find(name) is None:
        return columns, rows
    more = _csv_rows(home, name, _separator(home, name, ","))
    check_whole_lines(more.short, more.columns)
    more_columns, more_rows = more.columns, more.rows
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
