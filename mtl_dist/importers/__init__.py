"""From data of any form to a dataset: `run("folders", "data/cats", {"source": "cats", "task": "breed"})`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_dist.data.manifest import Manifest
    from mtl_dist.importers.importer import Importer
    from mtl_dist.importers.options import PackOptions


def run(
    importer: str | type[Importer],
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    options: PackOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Prepare the dataset `out` by an importer: a built-in one's name, an import path, or a class.

    `settings` are the arguments of its constructor; `progress` is called with what is done and what there is.

    Raises:
        UserError: no such importer, settings that do not fit, or data that cannot be used.
    """
    from mtl_dist.importers.options import STANDARD
    from mtl_dist.importers.packing import silent
    from mtl_dist.importers.road import make, prepare

    return prepare(make(importer, settings or {}), Path(out), options or STANDARD, progress or silent)
