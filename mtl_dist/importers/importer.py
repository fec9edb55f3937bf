"""An importer of the user's, by its import path and with its arguments: `mtl prepare own`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError

from mtl_dist.config.errors import explain
from mtl_dist.config.overrides import apply_overrides
from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.data.manifest import Manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.packing import STANDARD, PackOptions, Progress, pack, refuse_existing, silent


class Importer(ABC):
    """Reads data of some form: names its tasks, and gives its samples."""

    @abstractmethod
    def tasks(self) -> Mapping[str, TaskSource]:
        """Each task: its kind, class names, unit."""

    @abstractmethod
    def records(self) -> Iterable[tuple[str, Record]]:
        """Every sample with the name of its split; keys of letters, digits, `_` and `-`, each once."""


class UserImporterSettings(UserDefinedSettings):
    """An importer of the user's."""

    part_base = "mtl_dist.importers.importer.Importer"


class _Request(Settings):
    own: Annotated[UserImporterSettings, UserDefined((UserImporterSettings,), only=True)]


def prepare_own(
    importer: str,
    out: Path,
    arguments: Sequence[str] = (),
    options: PackOptions = STANDARD,
    progress: Progress = silent,
) -> Manifest:
    """Prepare what the class at the import path `importer` reads, made with `arguments` (`name=value`).

    Raises:
        UserError: no such class, wrong arguments, a key that comes twice; or what `pack` refuses.
    """
    refuse_existing(out)
    reader = _importer(importer, arguments).make()
    splits: dict[str, list[Record]] = {}
    keys = set()
    for split, record in reader.records():
        if record.key in keys:
            raise UserError(f"{importer}: expected each key once, found {record.key!r} twice.")
        keys.add(record.key)
        splits.setdefault(split, []).append(record)
    if not splits:
        raise UserError(f"{importer}: expected samples, found none.")
    return pack(splits, out, reader.tasks(), out.resolve().name, (), options, progress)


def _importer(importer: str, arguments: Sequence[str]) -> UserImporterSettings:
    data: dict[str, Any] = {}
    _, mistakes = apply_overrides(data, arguments)
    lines = [line for _, line in mistakes]
    try:
        request = _Request.model_validate_json(json.dumps({"own": {**data, "kind": importer}}))
    except ValidationError as error:
        lines += [line.removeprefix("own.") for _, line in explain(error, _Request)]
    if lines:
        raise UserError("\n".join(lines))
    return request.own
