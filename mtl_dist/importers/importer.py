"""What reads data of some form: built-in or user-defined, the same interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from mtl_dist.importers.account import Account
from mtl_dist.importers.jobs import Record, TaskSource

if TYPE_CHECKING:
    from pathlib import Path

    from mtl_dist.data.manifest import Manifest
    from mtl_dist.importers.options import PackOptions
    from mtl_dist.importers.packing import Progress


@dataclass(frozen=True)
class LeftOut:
    """In place of a record: one that cannot be used, and why. `--max-skipped` says how many may be."""

    reason: str


class Importer(ABC):
    """Names the tasks of the data, then streams its samples; the constructor's arguments are its settings.

    Splits, groups, keys, order, skipping, memory and progress are the business of the road (`road.py`), the
    same for every importer. `records` is read once, in its order, and no image is held: one that is given as
    bytes is put aside at once.
    """

    fractions: ClassVar[tuple[float, ...]] = (0.8, 0.1, 0.1)
    """The splits of data that brings none."""
    val: ClassVar[float] = 0.0
    """The share of train to validate on, where the data has splits but no val."""
    verify: ClassVar[bool] = True
    """Whether images may be damaged, so that they are decoded once."""
    repacks: ClassVar[bool] = True
    """Whether images are encoded again, so that they can be converted on the way."""

    @abstractmethod
    def tasks(self) -> Mapping[str, TaskSource]:
        """Each task: its kind, class names, unit."""

    @abstractmethod
    def records(self) -> Iterable[Record | LeftOut]:
        """Every sample, lazily: an image is a file that is read later, or bytes."""

    def notes(self) -> Iterator[str]:
        """What is to be said of the data, once its records were read."""
        yield from ()

    def index(self, out: Path, options: PackOptions, progress: Progress) -> Manifest:
        """The dataset `out` over images that stay where they are; of importers that do not repack."""
        raise NotImplementedError(type(self).__name__)

    def ungrouped(self) -> frozenset[str]:
        """The columns of its records that are used otherwise, and are no groups."""
        return frozenset()

    @property
    def name(self) -> str:
        """What the dataset is called; without it as the folder that it is written to."""
        return ""

    @property
    def stratify(self) -> str:
        """The task by which new splits are balanced; without it the first that gives each image a class."""
        return ""

    @cached_property
    def account(self) -> Account:
        """What was found, and what became of it."""
        return Account()
