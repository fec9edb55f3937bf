"""A table of labels: one row per image, one column per task, masks by column or by folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.errors import UserError
from mtl_dist.importers.account import HIDDEN, IMAGE, MASK, SAMPLE, TABLE
from mtl_dist.importers.compute import Computed, with_computed
from mtl_dist.importers.finding import FileFinder, MaskFolder, files_beside
from mtl_dist.importers.importer import Importer, LeftOut
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.lists import SplitLists, lists_beside, looks_like_a_file, splits_in_lists
from mtl_dist.importers.options import Help
from mtl_dist.importers.patterns import check_pattern, columns_in, filled_in, is_pattern
from mtl_dist.importers.road import split_word
from mtl_dist.importers.sources import Source
from mtl_dist.importers.split_columns import SPLIT, split_column, split_words
from mtl_dist.importers.splitting import split_name, splits_of_folders
from mtl_dist.importers.summary import listed
from mtl_dist.importers.table_files import FILE, Row, read_table
from mtl_dist.importers.wanted import (
    Classes,
    Colours,
    Facts,
    Labels,
    Missing,
    Separator,
    Strict,
    Units,
    Wanted,
    check_columns,
    wanted_tasks,
    with_colours,
)
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.vocabulary import MISSING

_NO_IMAGE = "left out: its image is not there"
_REPEATED = "left out: it repeats another"
_BLANK = "left out: blank"
_LEGEND = "left out: a legend, which names no image"
_NO_ROW = "left out: no row names it"
_ROWS, _FILES = "rows", "files"


@dataclass(frozen=True)
class _ImageRow:
    """A row whose image was found: the row, the image's path in the tree, and its source."""

    row: Row
    path: str
    source: Source


class TableImporter(Importer):
    """A table of labels: one row per image, one column per task. An empty cell is a missing label.

    \b
      mtl prepare table labels.csv data/skin --image file --root images \\
          --classification diagnosis=dx --regression age=age --unit age=years \\
          --segmentation lesion=masks --split split

    \b
      mtl prepare table list.txt data/pets --classification breed=label
      mtl prepare table labels.csv data/skin --image '{image_id}.jpg' --classification diagnosis=dx \\
          --segmentation lesion='{id}_segmentation.png'

    Masks are in a column of files, in a folder in which a mask has the stem of its image, or named by a
    pattern. Splits are those of a column `split`, of folders called train, val and test, or of lists
    train.txt, val.txt and test.txt; else they are made. A row that repeats another is left out and counted;
    one that gives the same image other labels is refused.
    """

    def __init__(
        self,
        source: Annotated[
            Path, Help("csv, tsv, json or a plain list; or a directory or zip that holds one.", "FILE")
        ],
        image: Annotated[
            str, Help("The column of image files, or a pattern as '{id}.jpg'.", "COLUMN|PATTERN")
        ] = FILE,
        root: Annotated[Path | None, Help("Where the files are; without it beside FILE.", "DIR")] = None,
        labels: Labels = {},  # noqa: B006 (never changed)
        classes: Classes = {},  # noqa: B006
        units: Units = {},  # noqa: B006
        facts: Facts = {},  # noqa: B006
        separator: Separator = "|",
        missing: Missing = MISSING,
        strict: Strict = False,
        compute: Computed = {},  # noqa: B006
        colours: Colours = {},  # noqa: B006
    ) -> None:
        names = with_colours(classes, colours)
        self._wanted = wanted_tasks(labels, names, units, separator, missing, strict, facts)
        self._table = read_table(source, root)
        self._rows = with_computed(self._table.rows, compute)
        self._columns = (*self._table.columns, *compute)
        self._image = image
        if is_pattern(image):
            check_pattern("--image", image, self._columns, of_image=False)
        else:
            check_columns([image], self._columns, "--image")
        self._of_labels = {
            task.task: (task.column,) if task.is_map else task.columns(self._columns, "table")
            for task in self._wanted
        }
        self._label_columns = {column for columns in self._of_labels.values() for column in columns}
        self._split_column = self._find_split_column()
        self._finder = FileFinder(self._table.tree, self._table.folder)
        self._notes: list[str] = list(self._table.notes)
        self._lists = self._split_lists()
        self._missing: list[str] = []

    @property
    def name(self) -> str:
        return self._table.name

    def tasks(self) -> Mapping[str, TaskSource]:
        account = self.account
        account.found(_ROWS, (row.where for row in self._rows))
        for where, fate in self._table.left_out.items():
            account.found(_ROWS, [where])
            account.became(_ROWS, where, fate)
        self._images = self._without_repeated(self._find_images())
        rows = [image.row for image in self._images]
        tasks: dict[str, TaskSource] = {}
        self._labels: dict[str, Sequence[Label | None]] = {}
        self._masks: dict[str, Sequence[Source | None]] = {}
        for task in self._wanted:
            classes = self._table.classes.get(task.column)
            if not task.is_map:
                tasks[task.task], self._labels[task.task], notes = task.read(rows, classes)
                self._notes += notes
                continue
            tasks[task.task] = task.map_task(classes)
            self._masks[task.task] = self._find_masks(task)
        self._enter_files()
        return tasks

    def records(self) -> Iterator[Record | LeftOut]:
        for reason in self._missing:
            yield LeftOut(reason)
        splits = self._splits()
        for i, image in enumerate(self._images):
            labels = {
                task: label for task, column in self._labels.items() if (label := column[i]) is not None
            }
            masks = {task: mask for task, column in self._masks.items() if (mask := column[i]) is not None}
            self.account.became(_ROWS, image.row.where, SAMPLE)
            yield Record("", image.source, labels, masks, splits[i], "", image.path, image.row.cells)

    def notes(self) -> Iterator[str]:
        yield from self._notes

    def ungrouped(self) -> frozenset[str]:
        named = [self._image, *self._label_columns]
        in_patterns = [column for text in named if is_pattern(text) for column in columns_in(text)]
        return frozenset((*named, *in_patterns, self._split_column))

    def _image_name(self, row: Row) -> str:
        """What a row calls its image; nothing where it has none.

        Raises:
            UserError: it holds a list.
        """
        if is_pattern(self._image):
            return filled_in(self._image, row.cells)
        cell = row.cells[self._image]
        if isinstance(cell, list):
            raise UserError(f"{row.where}: expected a file name in column {self._image!r}, found {cell}.")
        return cell

    def _split_of(self, row: Row) -> str:
        split = row.cells.get(self._split_column, "")
        return split_name(split) if isinstance(split, str) else ""

    def _find_images(self) -> Iterator[_ImageRow]:
        """The rows whose image is there; `records` reports the others."""
        blank: list[str] = []
        legend: list[str] = []
        short: list[str] = []
        names = [self._image_name(row) for row in self._rows]
        found_files = [
            self._finder.find(name, self._split_of(row)) if name else None
            for row, name in zip(self._rows, names, strict=True)
        ]
        named_so = [looks_like_a_file(name) for name, found in zip(names, found_files, strict=True) if found]
        by_extension = all(named_so) and bool(named_so)
        for row, name, found in zip(self._rows, names, found_files, strict=True):
            if not any(row.cells.values()):
                blank.append(row.where)
                self.account.became(_ROWS, row.where, _BLANK)
                continue
            is_short = row.where in self._table.short
            if found is None and (not name or is_short or (by_extension and not looks_like_a_file(name))):
                legend.append(row.where)
                self.account.became(_ROWS, row.where, _LEGEND)
            elif found is None:
                self.account.became(_ROWS, row.where, _NO_IMAGE)
                self._missing.append(
                    f"{row.where}: expected the image {name!r} {self._finder.not_found(name)}"
                )
            else:
                if is_short:
                    short.append(row.where)
                yield _ImageRow(row, *found)
        if len(legend) + len(blank) == len(self._rows):
            raise UserError(
                f"{self._rows[0].where}: expected a file name in column {self._image!r}, found "
                f"{repr(names[0]) if names[0] else 'nothing'}, and none in the other rows. Name the column, "
                "or a pattern, with --image."
            )
        for what, rows in (
            ("blank rows, left out", blank),
            ("rows that name no image, such as a legend, left out", legend),
            ("lines with fewer cells than columns, whose last labels are missing", short),
            ("rows without their image, left out", self._missing),
        ):
            if rows:
                self._notes.append(f"{what}: {len(rows)} ({listed(rows)})")

    def _find_masks(self, task: Wanted) -> list[Source | None]:
        """The file of each image's map: from a column, by a pattern, or in a folder.

        Raises:
            UserError: no such folder or file; or none for any image.
        """
        option = f"--{task.kind} {task.task}={task.column}"
        if task.column in self._columns:
            return [_mask_of_cell(image.row, task.column, self._finder) for image in self._images]
        if is_pattern(task.column):
            check_pattern(f"--{task.kind} {task.task}", task.column, self._columns, of_image=True)
            names = [filled_in(task.column, image.row.cells, image.path) for image in self._images]
            masks = [
                self._beside(image, name) if name else None
                for image, name in zip(self._images, names, strict=True)
            ]
            lacking = [image.path for image, mask in zip(self._images, masks, strict=True) if mask is None]
            if len(lacking) == len(masks) and masks:
                raise UserError(
                    f"{option}: expected the file {names[0]!r} {self._finder.not_found(names[0])} "
                    "Correct the pattern."
                )
            if lacking:
                self._notes.append(
                    f"{task.task}: images without a file of that pattern, unlabelled: {len(lacking)} "
                    f"({listed(lacking)})"
                )
            return masks
        folder = MaskFolder(self._table.tree, task.column, self._columns)
        masks = [folder.find(image.path, image.source) for image in self._images]
        if masks and not any(masks):
            first = PurePosixPath(self._images[0].path)
            stems = [PurePosixPath(name).stem for name in folder.files]
            endings = [stem.removeprefix(first.stem) for stem in stems if stem.startswith(first.stem)]
            ending = next(filter(None, endings), "_mask")
            raise UserError(
                f"{option}: expected maps called as their images, such as {first.stem}.png for {first.name}, "
                f"found none; {folder.tree} holds {listed(folder.files) or 'no pictures'} there. A pattern "
                f"names others: '{{id}}{ending}.png'."
            )
        return masks

    def _beside(self, image: _ImageRow, name: str) -> Source | None:
        """The file of a name: in the folder of the image, or anywhere in the tree."""
        near = self._table.tree.find(f"{PurePosixPath(image.path).parent.as_posix()}/{name}")
        found = near or next(iter((self._finder.find(name, "") or ("", None))[1:]), None)
        return None if found == image.source else found

    def _without_repeated(self, rows: Iterator[_ImageRow]) -> list[_ImageRow]:
        """The rows with each image once; a repetition that says something else is refused."""
        columns = {*self._label_columns, self._split_column}
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
            self.account.became(_ROWS, image.row.where, _REPEATED)
        if repeated:
            self._notes.append(f"rows that repeat another, left out: {len(repeated)} ({listed(repeated)})")
        return kept

    def _enter_files(self) -> None:
        """Account for the files in the folders of the images, of an archive for all."""
        account, tree = self.account, self._table.tree
        images = [os.path.normpath(image.source.path) for image in self._images]
        masks = [
            os.path.normpath(mask.path)
            for column in self._masks.values()
            for mask in column
            if mask is not None
        ]
        beside, hidden = files_beside(tree, images)
        account.found(_FILES, (*images, *masks, *beside, *hidden))
        for fate, names in ((IMAGE, images), (MASK, masks), (HIDDEN, hidden)):
            for name in names:
                account.became(_FILES, name, fate)
        home = self._table.home
        lists = [
            name if home.is_archive else os.path.normpath(home.root / name) for name in self._lists.files
        ]
        for name in (*self._table.files, *lists):
            account.found(_FILES, [name])
            account.became(_FILES, name, TABLE)
        unnamed = account.rest(_FILES, _NO_ROW)
        folders = {os.path.dirname(path) for path in images}
        pictures = sorted(
            tree.relative(name)
            for name in unnamed
            if extension_of(name) in IMAGE_EXTENSIONS and os.path.dirname(name) in folders
        )
        if pictures:
            self._notes.append(
                f"pictures beside them without a row, left out: {len(pictures)} ({listed(pictures)})"
            )

    def _split_lists(self) -> SplitLists:
        """The lists of splits beside the table, if it is none of them itself."""
        home = self._table.home
        names = [name if home.is_archive else os.path.relpath(name, home.root) for name in self._table.files]
        parent = PurePosixPath(names[0]).parent.as_posix()
        beside = [] if self._split_column else lists_beside(home, "" if parent == "." else f"{parent}/")
        return SplitLists(home, [] if set(beside) & set(names) else beside)

    def _find_split_column(self) -> str:
        """The column that says the splits of the rows with an image."""
        used = {*self._label_columns, self._image}
        rows = [row for row in self._rows if self._image_name(row)]
        return split_column(
            {name: [row.cells[name] for row in rows] for name in self._columns if name not in used}
        )

    def _splits(self) -> list[str]:
        """The word for each row's split that the data has, or nothing."""
        column = self._split_column
        if column:
            if column != SPLIT:
                self._notes.append(f"splits taken from the column {column!r}")
            words = split_words(column, [image.row.cells[column] for image in self._images])
            return [
                split_word(word, f"{image.row.where}, column {column!r}")
                for word, image in zip(words, self._images, strict=True)
            ]
        folders = splits_of_folders([image.path for image in self._images])
        if any(folders):
            self._notes.append("splits taken from the folders of the images")
            return folders
        return splits_in_lists(self._lists, [image.path for image in self._images], self._notes)


def _mask_of_cell(row: Row, column: str, finder: FileFinder) -> Source | None:
    cell = row.cells[column]
    if not cell:
        return None
    found = finder.find(str(cell), "") if isinstance(cell, str) else None
    if found is None:
        raise UserError(f"{row.where}: expected the mask {cell!r} {finder.not_found(str(cell))}")
    return found[1]
