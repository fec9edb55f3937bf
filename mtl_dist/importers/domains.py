"""Office-31, Office-Home and their like: the same classes in several domains, each domain a task.

Office-Home   Art/Alarm_Clock/00001.jpg       Clipart/...   Product/...   Real World/...
Office-31     amazon/images/back_pack/a.jpg   dslr/...      webcam/...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

from mtl_dist.config.describe import listed
from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.errors import UserError
from mtl_dist.importers.account import IMAGE, NO_IMAGE
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import Help
from mtl_dist.importers.sources import Tree
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.vocabulary import class_order

_BETWEEN = "images"
"""The folder that Office-31 has between a domain and its classes."""


class Domains(Importer):
    """DOMAIN/CLASS/picture.jpg (Office-Home) or DOMAIN/images/CLASS/picture.jpg (Office-31).

    \b
      mtl prepare domains OfficeHomeDataset/ data/office
      mtl prepare domains office31/ data/office31 --split 0.6,0.2,0.2

    Each domain is a task over its own pictures, and all have the same classes: those of any domain.
    """

    def __init__(self, source: Annotated[Path, Help("The folder, or a zip, of the domains.", "SRC")]) -> None:
        self._source, self._tree = source, Tree(source)
        self._places: dict[str, tuple[str, str]] = {}
        for path in self._tree.files:
            parents = [part for part in PurePosixPath(path).parts[:-1] if part != _BETWEEN]
            if len(parents) >= 2 and extension_of(path) in IMAGE_EXTENSIONS:
                self._places[path] = (_task_name(parents[-2]), parents[-1])
        self._domains = sorted({domain for domain, _ in self._places.values()})
        if len(self._domains) < 2:
            raise UserError(
                f"{source}: expected pictures as DOMAIN/CLASS/picture.jpg of two domains or more, found "
                f"{len(self._places)} pictures of {listed(self._domains)}. Name the folder that "
                "the domains are in; `mtl prepare folders` reads a single one."
            )
        self._classes = class_order({name for _, name in self._places.values()})
        self._tree.enter(self.account)
        for path in self._places:
            self.account.became("files", path, IMAGE)
        self.account.rest("files", NO_IMAGE)

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def tasks(self) -> Mapping[str, TaskSource]:
        return {domain: TaskSource(Classification.name, tuple(self._classes)) for domain in self._domains}

    def records(self) -> Iterator[Record]:
        numbers = {name: number for number, name in enumerate(self._classes)}
        for path, (domain, name) in self._places.items():
            yield Record("", self._tree.source(path), {domain: numbers[name]}, path=path)

    def notes(self) -> Iterator[str]:
        for domain in self._domains:
            own = {name for task, name in self._places.values() if task == domain}
            if lacking := [name for name in self._classes if name not in own]:
                yield f"{domain} has no picture of {listed(lacking)}"


def _task_name(domain: str) -> str:
    """A domain as a task's name: `Real World` is Real_World."""
    return domain.replace(" ", "_").replace(".", "_")
