"""Files that hold many small pictures each, as one array, with a column of classes per task.

IDX files and CIFAR's records are such: their importers read them into parts, and here the parts become a
dataset.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.importers.account import SAMPLE
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.measures import MEASURES
from mtl_dist.importers.pixels import encoded_picture
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.regression import Regression

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, eq=False)
class ArrayPart:
    """The pictures of one file: `pictures` (N, H, W) or (N, H, W, C) uint8, `classes` (N,) by task.

    `name` is unique among the parts and begins the keys of its samples.
    """

    name: str
    split: str
    pictures: np.ndarray
    classes: Mapping[str, np.ndarray]


def unpacked(source: Source) -> bytes:
    """The bytes of a file that may be compressed by gzip.

    Raises:
        UserError: unreadable, or a damaged gzip file.
    """
    data = source.read()
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: expected a whole gzip file, found: {error}. Copy it again.") from None


def class_names_of(
    name: str, parts: Sequence[ArrayPart], names: Sequence[str] | None, where: Callable[[ArrayPart], str]
) -> tuple[str, ...]:
    """The class names of one task: `names`, or the numbers from 0 to the largest label.

    Raises:
        UserError: a label beyond the names; `where` says which file a part is.
    """
    if names is None:
        largest = max(int(part.classes[name].max(initial=0)) for part in parts)
        return tuple(str(index) for index in range(largest + 1))
    for part in parts:
        wrong = np.flatnonzero(part.classes[name] >= len(names))
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"{where(part)}, picture {first}: expected a class of {name} from 0 to {len(names) - 1}, "
                f"found {int(part.classes[name][first])}. {len(wrong)} labels are out of range."
            )
    return tuple(names)


class ArrayImporter(Importer):
    """Shares what importers of arrays do: `parts` and the class names by task are found by them.

    A tenth of the training pictures is held out to validate on, where the data has no val part; every class
    of the task with the most classes is divided alike.
    """

    val: ClassVar[float] = 0.1
    verify: ClassVar[bool] = False

    parts: Sequence[ArrayPart]
    classes: Mapping[str, tuple[str, ...]]
    measures: Sequence[str] = ()
    source: Path
    tree: Tree

    @property
    def name(self) -> str:
        return self.source.resolve().stem

    @property
    def stratify(self) -> str:
        return max(self.classes, key=lambda task: len(self.classes[task]))

    def tasks(self) -> Mapping[str, TaskSource]:
        splits = {part.split for part in self.parts}
        if "train" not in splits:
            raise UserError(
                f"{self.name}: expected training pictures, found only {', '.join(sorted(splits))}."
            )
        tasks = {task: TaskSource(Classification.name, names) for task, names in self.classes.items()}
        return tasks | {name: TaskSource(Regression.name, unit=MEASURES[name].unit) for name in self.measures}

    def records(self) -> Iterator[Record]:
        for part in self.parts:
            self.account.count("pictures", SAMPLE, len(part.pictures))
            for number, picture in enumerate(part.pictures):
                labels: dict[str, Label] = {
                    task: int(column[number]) for task, column in part.classes.items()
                }
                labels |= {name: MEASURES[name].of(picture) for name in self.measures}
                key = f"{part.name}_{number:06d}"
                yield Record(key, encoded_picture(picture), labels, split=part.split)

    def enter_files(self, used: Iterable[str]) -> None:
        """Account for the files of the tree, of which those at the paths `used` were read."""
        self.tree.enter(self.account)
        for path in used:
            self.account.became("files", path, "read")
        self.account.rest("files", "left out: no such file by its name")
