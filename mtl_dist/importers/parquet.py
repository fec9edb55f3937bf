"""Parquet and Arrow files with a row per image, as Hugging Face's datasets keep them.

    data/train-00000-of-00002.parquet    image: {bytes, path}   label: 0, 1, ...   (names in its metadata)

Images are bytes in the file, or paths of files beside it. Splits are in the names of files or folders.
https://huggingface.co/docs/datasets/image_load
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from mtl_dist.errors import UserError
from mtl_dist.importers.account import IMAGE, SAMPLE, TABLE
from mtl_dist.importers.finding import FileFinder
from mtl_dist.importers.importer import Importer, LeftOut
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import Help
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.splitting import is_split_word
from mtl_dist.importers.table_files import Row
from mtl_dist.importers.wanted import (
    Classes,
    Colours,
    Facts,
    Labels,
    Missing,
    Separator,
    Strict,
    Units,
    check_columns,
    wanted_tasks,
    with_colours,
)
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.vocabulary import MISSING, Cell

if TYPE_CHECKING:
    import pyarrow

_PARQUET, _ARROW = ".parquet", ".arrow"
_WORD = re.compile(r"[A-Za-z]+")
_BATCH = 64
_NO_IMAGE = "left out: it has no image"
_ROWS, _FILES = "rows", "files"


class Parquet(Importer):
    """Parquet or Arrow files with a row per image, such as a Hugging Face dataset's.

    \b
      mtl prepare parquet beans/ data/beans --classification disease=labels
      mtl prepare parquet scenes.parquet data/scenes --image pixels --segmentation road=mask --regression t=t

    The names of classes are those in the files' metadata, where it has some; -1 is no label there. Maps are
    columns of images. Splits are in the names of files or folders (train-00000-of-00002.parquet); else made.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("A .parquet or .arrow file, or a directory of them.", "SRC")],
        image: Annotated[
            str, Help("The column of images: bytes, bytes and path, or paths.", "COLUMN")
        ] = "image",
        labels: Labels = {},  # noqa: B006 (never changed)
        classes: Classes = {},  # noqa: B006
        colours: Colours = {},  # noqa: B006
        units: Units = {},  # noqa: B006
        facts: Facts = {},  # noqa: B006
        separator: Separator = "|",
        missing: Missing = MISSING,
        strict: Strict = False,
    ) -> None:
        _pyarrow()
        names = with_colours(classes, colours)
        self._wanted = wanted_tasks(labels, names, units, separator, missing, strict, facts)
        self._source, self._image = source, image
        if source.is_file() and source.suffix.lower() in (_PARQUET, _ARROW):
            self._tree, self._files = Tree(source.parent), [source.name]
        elif source.is_dir():
            self._tree = Tree(source)
            self._files = [
                name for name in self._tree.files if PurePosixPath(name).suffix.lower() in (_PARQUET, _ARROW)
            ]
        else:
            self._files = []
        if not self._files:
            raise UserError(
                f"{source}: expected a .parquet or .arrow file, or a directory of them, found none."
            )
        self._finder = FileFinder(self._tree, "")
        self._features: dict[str, Any] = {}
        columns: list[str] = []
        for name in self._files:
            schema = self._schema(name)
            columns = columns or list(schema.names)
            if set(schema.names) != set(columns):
                raise UserError(
                    f"{self._tree}/{name}: expected the columns {', '.join(columns)} as in {self._files[0]}, "
                    f"found {', '.join(schema.names)}. Prepare them one by one."
                )
            self._features = self._features or _features(schema)
        self._columns = columns
        check_columns([image], columns, "--image")
        of_labels = [
            (task.column,) if task.is_map else task.columns(columns, "table") for task in self._wanted
        ]
        self._label_columns = [column for names in of_labels for column in names]
        check_columns(self._label_columns, columns, "table")
        self._maps = {task.task: task.column for task in self._wanted if task.is_map}
        pictures = {image, *self._maps.values()}
        self._scalars = [
            column
            for column in columns
            if column not in pictures and not _holds_bytes(self._schema(self._files[0]).field(column).type)
        ]
        self._notes: list[str] = []

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def tasks(self) -> Mapping[str, TaskSource]:
        self._rows = [row for name in self._files for row in self._cells(name)]
        self.account.found(_ROWS, (row.where for row in self._rows))
        for name in self._files:
            self.account.found(_FILES, [name])
            self.account.became(_FILES, name, TABLE)
        tasks: dict[str, TaskSource] = {}
        self._labels: dict[str, Sequence[Label | None]] = {}
        for task in self._wanted:
            names = _class_names(self._features.get(task.column))
            if task.is_map:
                tasks[task.task] = task.map_task(names)
                continue
            tasks[task.task], self._labels[task.task], notes = task.read(self._rows, names)
            self._notes += notes
        return tasks

    def records(self) -> Iterator[Record | LeftOut]:
        at = 0
        for name in self._files:
            split = _split_of(name)
            for values in self._batches(name, [self._image, *self._maps.values()]):
                row = self._rows[at]
                labels = {
                    task: label for task, column in self._labels.items() if (label := column[at]) is not None
                }
                at += 1
                image, path = self._picture(values[self._image], row.where)
                if image is None:
                    self.account.became(_ROWS, row.where, _NO_IMAGE)
                    yield LeftOut(f"{row.where}: expected an image in column {self._image!r}, found nothing.")
                    continue
                masks = {
                    task: found
                    for task, column in self._maps.items()
                    if (found := self._picture(values[column], row.where)[0]) is not None
                }
                self.account.became(_ROWS, row.where, SAMPLE)
                number = row.where.rpartition(" ")[2]
                path = path or f"{PurePosixPath(name).with_suffix('')}_{number}.png"
                yield Record("", image, labels, masks, split, "", path, row.cells)

    def notes(self) -> Iterator[str]:
        yield from self._notes

    def ungrouped(self) -> frozenset[str]:
        return frozenset((self._image, *self._label_columns))

    def _schema(self, name: str) -> pyarrow.Schema:
        import pyarrow
        from pyarrow import ipc
        from pyarrow import parquet as pq

        place = str(self._tree.root / name)
        try:
            if name.lower().endswith(_PARQUET):
                return pq.read_schema(place)
            with pyarrow.memory_map(place) as file:
                return ipc.open_stream(file).schema
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{place}: expected a parquet or Arrow file, found: {error}.") from None

    def _batches(self, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The cells of some columns, row by row."""
        import pyarrow
        from pyarrow import ipc
        from pyarrow import parquet as pq

        place = str(self._tree.root / name)
        wanted = list(dict.fromkeys(columns))
        try:
            if name.lower().endswith(_PARQUET):
                with pq.ParquetFile(place) as file:
                    for batch in file.iter_batches(_BATCH, columns=wanted):
                        yield from batch.to_pylist()
                return
            with pyarrow.memory_map(place) as mapped:
                for batch in ipc.open_stream(mapped):
                    yield from batch.select(wanted).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{place}: expected a whole parquet or Arrow file, found: {error}.") from None

    def _cells(self, name: str) -> Iterator[Row]:
        """The cells of a file that are no pictures, as texts."""
        if self._scalars:
            for number, values in enumerate(self._batches(name, self._scalars)):
                where = f"{self._tree}/{name} row {number}"
                yield Row(where, {c: _cell(values[c], self._features.get(c), where) for c in self._scalars})
            return
        for number, _ in enumerate(self._batches(name, [self._image])):
            yield Row(f"{self._tree}/{name} row {number}", {})

    def _picture(self, value: Any, where: str) -> tuple[Source | bytes | None, str]:
        """The picture in a cell, and its path, if it says one.

        Raises:
            UserError: it names a file that is not there, or is none.
        """
        path = ""
        if isinstance(value, dict):
            path = str(value.get("path") or "")
            value = value.get("bytes") or path or None
        if value is None or value == "":
            return None, path
        if isinstance(value, bytes):
            return value, path
        if not isinstance(value, str):
            raise UserError(f"{where}: expected an image as bytes or a path, found {type(value).__name__}.")
        found = self._finder.find(value, "")
        if found is None:
            raise UserError(f"{where}: expected the image {value!r} {self._finder.not_found(value)}")
        self.account.found(_FILES, [found[0]])
        self.account.became(_FILES, found[0], IMAGE)
        return found[1], value


def _pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401 (used where files are read)
    except ImportError:
        raise UserError(
            'parquet: expected pyarrow, found none. Install it with `pip install "mtl-dist[parquet]"`.'
        ) from None


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return True
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _features(schema: pyarrow.Schema) -> dict[str, Any]:
    """What Hugging Face's datasets say of the columns; empty where others wrote the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """The class names of a column, or of the lists in it; None where there are none."""
    if isinstance(feature, list) and feature:
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return None
    if isinstance(feature.get("names"), list):
        return tuple(str(name) for name in feature["names"])
    return _class_names(feature.get("feature"))


def _cell(value: Any, feature: Any, where: str) -> Cell:
    """A value as text: a class by its name."""
    names = _class_names(feature)
    if isinstance(value, list):
        return [str(_cell(item, feature, where)) for item in value]
    if value is None or (names and value == -1):
        return ""
    if names and isinstance(value, int):
        if not 0 <= value < len(names):
            raise UserError(f"{where}: expected a class from 0 to {len(names) - 1}, found {value}.")
        return names[value]
    return json.dumps(value) if isinstance(value, bool) else str(value).strip()


def _split_of(name: str) -> str:
    """The split that the name of a file begins with, or a folder is called as; else nothing."""
    path = PurePosixPath(name)
    first = _WORD.match(path.stem)
    if first and is_split_word(first[0]):
        return first[0].lower()
    return next((part.lower() for part in reversed(path.parts[:-1]) if is_split_word(part)), "")
