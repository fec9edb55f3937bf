"""A table of labels: one row per image, one column per task, masks by column or by folder."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mtl_dist.data.manifest import Manifest
from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.importers.finding import FileFinder, MaskFolder, unnamed_images
from mtl_dist.importers.jobs import Record, TaskSource, check_skipped
from mtl_dist.importers.packing import STANDARD, PackOptions, Progress, pack, refuse_existing, silent
from mtl_dist.importers.sources import Source
from mtl_dist.importers.splitting import (
    DEFAULT_FRACTIONS,
    SPLIT_NAMES,
    split_by_fractions,
    split_name,
    unique_keys,
)
from mtl_dist.importers.summary import listed
from mtl_dist.importers.tables import FILE, SPLIT, Row, Table, read_labels, read_table
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.multilabel import Multilabel
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.segmentation import Segmentation
from mtl_dist.kinds.words import ClassNames, Declared, LabelError


def prepare_table(
    file: Path,
    out: Path,
    *,
    image: str = FILE,
    root: Path | None = None,
    classification: Mapping[str, str] = {},
    multilabel: Mapping[str, str] = {},
    regression: Mapping[str, str] = {},
    segmentation: Mapping[str, str] = {},
    classes: Mapping[str, ClassNames] = {},
    units: Mapping[str, str] = {},
    separator: str = "|",
    split: str | Sequence[float] | None = None,
    options: PackOptions = STANDARD,
    progress: Progress = silent,
) -> Manifest:
    """Prepare a dataset from a table (csv, tsv, json), or from a directory or zip that holds one.

    `image` is the column of file names, below `root` (where the table is, if not given), absolute, or
    enough of a path's end to tell one file from the others. `segmentation` gives for each task a column of
    mask files, or a folder in which a mask has the stem of its image. `classes` names the classes of a task
    by index or by value; of a mask they are background and the task's name if not given. `separator` stands
    between the classes in a multilabel cell. `split` is a column or fractions; without it the column
    "split" decides, else folders named train, val and test in the paths, else 0.8, 0.1, 0.1 by class.

    An empty cell is a missing label. A row that repeats another is left out and counted; one that gives the
    same image other labels is refused.

    Raises:
        UserError: a column, file, label or split that is not there or not understood; or what `pack`
            refuses.
    """
    refuse_existing(out)
    table = read_table(file, root)
    request = _Request(classification, multilabel, regression, segmentation, classes, units, separator)
    request.check(table, image)
    finder = FileFinder(table.tree, table.folder)
    notes: list[str] = []
    rows = _without_repeated(_find_images(table, image, finder, options.max_skipped, notes), request, notes)
    tasks, labels, masks = _read_tasks(request, table, finder, rows)
    all_masks = [mask for column in masks.values() for mask in column if mask is not None]
    if unnamed := unnamed_images(table.tree, [row.source for row in rows], all_masks):
        notes.append(f"pictures beside them without a row, left out: {len(unnamed)} ({listed(unnamed)})")

    keys = unique_keys([row.path for row in rows])
    first = next(iter(classification), None)
    strata: list[Hashable] = [str(labels[first][i]) if first else "" for i in range(len(rows))]
    splits = _splits(table, rows, keys, strata, split, options.seed, notes)
    records: dict[str, list[Record]] = {}
    for i, row in enumerate(rows):
        row_labels = {task: label for task, column in labels.items() if (label := column[i]) is not None}
        row_masks = {task: mask for task, column in masks.items() if (mask := column[i]) is not None}
        records.setdefault(splits[i], []).append(Record(keys[i], row.source, row_labels, row_masks))
    return pack(records, out, tasks, table.name, notes, options, progress)


@dataclass(frozen=True)
class _Request:
    """What was asked for: the column (of masks also the folder) of each task, by kind."""

    classification: Mapping[str, str]
    multilabel: Mapping[str, str]
    regression: Mapping[str, str]
    segmentation: Mapping[str, str]
    classes: Mapping[str, ClassNames]
    units: Mapping[str, str]
    separator: str

    @property
    def columns(self) -> dict[str, str]:
        """The column or folder of each task."""
        return {**self.classification, **self.multilabel, **self.regression, **self.segmentation}

    def check(self, table: Table, image: str) -> None:
        """Refuse a request that the table cannot meet."""
        kinds = (self.classification, self.multilabel, self.regression, self.segmentation)
        names = [task for kind in kinds for task in kind]
        if not names:
            raise UserError(
                "tasks: expected at least one task, found none. Example: --classification breed=COLUMN"
            )
        if len(set(names)) < len(names):
            raise UserError(f"tasks: expected each name once, found {', '.join(names)}.")
        check_task_names(names)
        scalars = {**self.classification, **self.multilabel, **self.regression}
        for column in (image, *scalars.values()):
            if column not in table.columns:
                nearest = difflib.get_close_matches(column, table.columns, 1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise UserError(
                    f"table: expected a column {column!r}, found {', '.join(map(repr, table.columns))}.{hint}"
                )
        for given, kinds_of in ((self.classes, "classes"), (self.units, "units")):
            for task in given:
                if task not in names:
                    raise UserError(
                        f"{kinds_of}: expected one of the tasks {', '.join(names)}, found {task!r}."
                    )


@dataclass(frozen=True)
class _ImageRow:
    """A row whose image was found: the row, the image's path in the tree, and its source."""

    row: Row
    path: str
    source: Source


def _find_images(
    table: Table, image: str, finder: FileFinder, max_skipped: int, notes: list[str]
) -> Iterator[_ImageRow]:
    """The rows whose image is there; the others are left out, if so many may be."""
    missing: list[str] = []
    for row in table.rows:
        cell = row.cells[image]
        if not isinstance(cell, str) or not cell:
            raise UserError(
                f"{row.where}: expected a file name in column {image!r}, found {cell or 'nothing'}."
            )
        split = row.cells.get(SPLIT, "")
        found = finder.find(cell, split_name(split) if isinstance(split, str) else "")
        if found is None:
            missing.append(f"{row.where}: expected the image {cell!r} in {table.tree}, found no such file.")
            check_skipped(missing, max_skipped)
        else:
            yield _ImageRow(row, *found)
    if missing:
        notes.append(f"rows without their image, left out: {len(missing)} ({listed(missing)})")


def _without_repeated(rows: Iterable[_ImageRow], request: _Request, notes: list[str]) -> list[_ImageRow]:
    """The rows with each image once; a repetition that says something else is refused."""
    columns = {*request.columns.values(), SPLIT}
    first: dict[str, Row] = {}
    kept: list[_ImageRow] = []
    repeated: list[str] = []
    for image in rows:
        before = first.setdefault(os.path.normpath(str(image.source)), image.row)
        if before is image.row:
            kept.append(image)
            continue
        for column in sorted(columns & image.row.cells.keys()):
            if before.cells[column] != image.row.cells[column]:
                raise UserError(
                    f"{image.row.where}: expected the image {image.path!r} once, found it also in "
                    f"{before.where} with another {column!r}. Keep one of the rows."
                )
        repeated.append(image.row.where)
    if repeated:
        notes.append(f"rows that repeat another, left out: {len(repeated)} ({listed(repeated)})")
    return kept


def _read_tasks(
    request: _Request, table: Table, finder: FileFinder, images: Sequence[_ImageRow]
) -> tuple[dict[str, TaskSource], dict[str, Sequence[Label | None]], dict[str, Sequence[Source | None]]]:
    """Each task, and its labels or masks in the order of `images`."""
    rows = [image.row for image in images]
    tasks: dict[str, TaskSource] = {}
    labels: dict[str, Sequence[Label | None]] = {}
    masks: dict[str, Sequence[Source | None]] = {}
    for task, column in request.columns.items():
        classes = request.classes.get(task, table.classes.get(column))
        declared = Declared(classes, request.units.get(task, ""), request.separator)
        scalars = (
            (request.classification, Classification.name),
            (request.multilabel, Multilabel.name),
            (request.regression, Regression.name),
        )
        kind = next((name for asked, name in scalars if task in asked), None)
        if kind is not None:
            names, labels[task] = read_labels(kind, rows, column, declared)
            tasks[task] = TaskSource(kind, names, declared.unit)
        else:
            tasks[task] = _mask_task(task, classes)
            if column in table.columns:
                masks[task] = [_mask_of_cell(row, column, finder) for row in rows]
            else:
                folder = MaskFolder(table.tree, column, table.columns)
                masks[task] = [folder.find(image.path) for image in images]
    return tasks, labels, masks


def _mask_task(task: str, classes: ClassNames | None) -> TaskSource:
    declared = Declared(classes)
    try:
        info = Segmentation().declare(task, declared)
    except LabelError as error:
        raise UserError(f"classes of {task!r}: {error}") from None
    return TaskSource(info.kind, info.classes, mask_values=declared.class_values)


def _mask_of_cell(row: Row, column: str, finder: FileFinder) -> Source | None:
    cell = row.cells[column]
    if not cell:
        return None
    found = finder.find(str(cell), "") if isinstance(cell, str) else None
    if found is None:
        raise UserError(f"{row.where}: expected the mask {cell!r} in {finder.tree}, found no such file.")
    return found[1]


def _splits(
    table: Table,
    rows: Sequence[_ImageRow],
    keys: Sequence[str],
    strata: Sequence[Hashable],
    split: str | Sequence[float] | None,
    seed: int,
    notes: list[str],
) -> list[str]:
    """The split of each row, by the first rule that applies (see `prepare_table`)."""
    if isinstance(split, str) and split not in table.columns:
        raise UserError(f"split: expected a column, found {split!r}. Columns: {', '.join(table.columns)}.")
    if split is None and SPLIT in table.columns:
        split = SPLIT
    if isinstance(split, str):
        return [_split_of_cell(image.row, split) for image in rows]
    if split is None:
        folders = [_split_folder(image.path) for image in rows]
        if all(folders):
            notes.append("splits taken from the folders of the images")
            return folders
        split = DEFAULT_FRACTIONS
    notes.append(f"split into {', '.join(f'{fraction:g}' for fraction in split)} with seed {seed}")
    return split_by_fractions(keys, strata, split, seed)


def _split_of_cell(row: Row, column: str) -> str:
    cell = row.cells[column]
    name = split_name(cell) if isinstance(cell, str) else ""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(
            f"{row.where}, column {column!r}: expected a split (train, val, test or another word), "
            f"found {cell or 'nothing'!r}."
        )
    return name


def _split_folder(path: str) -> str:
    """The split in whose folder the file is, or nothing."""
    names = [split_name(part) for part in PurePosixPath(path).parts[:-1]]
    return next((name for name in reversed(names) if name in SPLIT_NAMES), "")
