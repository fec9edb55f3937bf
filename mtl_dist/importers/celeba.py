"""CelebA: aligned faces, the text file of their 40 attributes, and that of its splits.

img_align_celeba/000001.jpg ...   list_attr_celeba.txt   list_eval_partition.txt
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from mtl_dist.config.describe import listed
from mtl_dist.errors import UserError
from mtl_dist.importers.account import IMAGE, TABLE
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import Help
from mtl_dist.importers.sources import Tree
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.keypoints import VISIBLE, Keypoints, labelled
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.multilabel import Multilabel

_ATTRIBUTES, _PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
_LANDMARKS = "list_landmarks_align_celeba.txt"
_SPLITS = {"0": "train", "1": "val", "2": "test"}
_VALUES = {"1": 1, "-1": 0}


class Celeba(Importer):
    """CelebA's faces with their attributes: a task for each, or one multilabel task.

    \b
      mtl prepare celeba celeba/ data/celeba
      mtl prepare celeba celeba/ data/celeba --as one
      mtl prepare celeba celeba/ data/celeba --landmarks face

    It reads list_attr_celeba.txt, list_eval_partition.txt (0 train, 1 val, 2 test) and the images that they
    name, wherever these lie below the folder.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("The folder, or a zip, with the images and both lists.", "SRC")],
        attributes_as: Annotated[
            Literal["tasks", "one"],
            Help("Each attribute is a task, or all are one.", "tasks|one", "as"),
        ] = "tasks",
        attributes: Annotated[
            tuple[str, ...], Help("Only these attributes; without it all.", "NAME,...")
        ] = (),
        landmarks: Annotated[
            str, Help("A task of this name too: the five points of list_landmarks_align_celeba.txt.", "NAME")
        ] = "",
    ) -> None:
        self._source, self._tree = source, Tree(source)
        self._as_tasks = attributes_as == "tasks"
        names, self._rows = self._attributes()
        for name in attributes:
            if name not in names:
                raise UserError(f"--attributes: expected some of {', '.join(names)}, found {name!r}.")
        self._names = tuple(name for name in names if not attributes or name in attributes)
        self._columns = [names.index(name) for name in self._names]
        self._splits = self._partition()
        self._images = {PurePosixPath(path).name: path for path in self._tree.files}
        missing = [name for name in self._rows if name not in self._images]
        if missing:
            raise UserError(
                f"{source}: expected the images that {_ATTRIBUTES} names, found none for {len(missing)} of "
                f"{len(self._rows)} ({listed(missing)}). Unpack img_align_celeba.zip there."
            )
        self._tree.enter(self.account)
        for name in self._rows:
            self.account.became("files", self._images[name], IMAGE)
        self._landmarks = landmarks
        self._point_names, self._points = self._read_landmarks() if landmarks else ((), {})
        for file in (_ATTRIBUTES, _PARTITION, *([_LANDMARKS] if landmarks else [])):
            self.account.became("files", self._images[file], TABLE)
        self.account.rest("files", "left out: not in the lists")

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def tasks(self) -> Mapping[str, TaskSource]:
        points = {self._landmarks: TaskSource(Keypoints.name, self._point_names)} if self._landmarks else {}
        if self._as_tasks:
            own = {_task_name(name): TaskSource(Classification.name, ("no", "yes")) for name in self._names}
            return own | points
        return {"attributes": TaskSource(Multilabel.name, self._names), **points}

    def records(self) -> Iterator[Record]:
        for name, values in self._rows.items():
            chosen = [_VALUES[values[column]] for column in self._columns]
            labels: dict[str, Label] = (
                dict(zip(map(_task_name, self._names), chosen, strict=True))
                if self._as_tasks
                else {"attributes": [number for number, value in enumerate(chosen) if value]}
            )
            if self._landmarks:
                labels[self._landmarks] = labelled(self._points[name])
            path = self._images[name]
            image = self._tree.source(path)
            yield Record(PurePosixPath(name).stem, image, labels, split=self._splits[name], path=path)

    def notes(self) -> Iterator[str]:
        for name in self._names if self._as_tasks else ():
            if (task := _task_name(name)) != name:
                yield f"attribute {name} is the task {task}, as a task's name starts with a letter"

    def _attributes(self) -> tuple[list[str], dict[str, list[str]]]:
        """The attributes' names, and by image their values."""
        _, names, *lines = self._lines(_ATTRIBUTES, at_least=3)
        attributes = names.split()
        rows = {line.split()[0]: line.split()[1:] for line in lines}
        for image, values in rows.items():
            if len(values) != len(attributes) or not set(values) <= set(_VALUES):
                raise UserError(
                    f"{_ATTRIBUTES}: expected {len(attributes)} values of 1 or -1 for {image}, found "
                    f"{len(values)} ({listed(sorted(set(values)))}). Copy the file again."
                )
        if len(rows) < len(lines):
            raise UserError(f"{_ATTRIBUTES}: expected each image once, found one twice. Correct the file.")
        return attributes, rows

    def _read_landmarks(self) -> tuple[tuple[str, ...], dict[str, list[list[float]]]]:
        """The names of the points, and by image each one's (x, y, visibility)."""
        _, columns, *lines = self._lines(_LANDMARKS, at_least=3)
        names = tuple(column.removesuffix("_x") for column in columns.split()[::2])
        rows: dict[str, list[list[float]]] = {}
        for line in lines:
            image, *texts = line.split()
            try:
                values = [float(text) for text in texts]
            except ValueError:
                values = []
            if len(values) != 2 * len(names):
                raise UserError(
                    f"{_LANDMARKS}: expected {2 * len(names)} numbers for {image}, found {line!r:.80}."
                )
            rows[image] = [[x, y, VISIBLE] for x, y in zip(values[::2], values[1::2], strict=True)]
        unknown = [image for image in self._rows if image not in rows]
        if unknown:
            raise UserError(
                f"{_LANDMARKS}: expected the points of each image in {_ATTRIBUTES}, found none for "
                f"{len(unknown)} ({listed(unknown)}). Take both files of one release."
            )
        return names, rows

    def _partition(self) -> dict[str, str]:
        """The split of each image."""
        splits = {}
        for line in self._lines(_PARTITION, at_least=1):
            image, _, number = line.partition(" ")
            if number.strip() not in _SPLITS:
                raise UserError(f"{_PARTITION}: expected an image and 0, 1 or 2, found {line!r}.")
            splits[image] = _SPLITS[number.strip()]
        unknown = [image for image in self._rows if image not in splits]
        if unknown:
            raise UserError(
                f"{_PARTITION}: expected the split of each image in {_ATTRIBUTES}, found none for "
                f"{len(unknown)} ({listed(unknown)}). Take both files of one release."
            )
        return splits

    def _lines(self, file: str, at_least: int) -> list[str]:
        """The lines of a list that are not empty."""
        paths = [path for path in self._tree.files if PurePosixPath(path).name == file]
        if len(paths) != 1:
            raise UserError(
                f"{self._source}: expected one file {file}, found {len(paths)}. "
                "It comes with CelebA's images."
            )
        text = self._tree.source(paths[0]).read().decode("utf-8-sig", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) < at_least:
            raise UserError(f"{paths[0]}: expected {file} of CelebA, found {len(lines)} lines.")
        return lines


def _task_name(attribute: str) -> str:
    """An attribute as a task's name: `5_o_Clock_Shadow` is is_5_o_Clock_Shadow."""
    return f"is_{attribute}" if attribute[0].isdigit() else attribute
