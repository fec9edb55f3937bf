"""The importers from Python, each as the command of its name: `mtl_dist.prepare.folders(...)`.

import mtl_dist

mtl_dist.prepare.digits("data/digits")
mtl_dist.prepare.folders("photos", "data/breeds", task="breed", val=0.1, seed=3)
mtl_dist.prepare.table("labels.csv", "data/skin", classification={"diagnosis": "dx"}, group="patient")
mtl_dist.prepare.importer(Scans, "data/scans", folder="/mnt/scans")

Besides an importer's own settings each takes those that all share: `split`, `val`, `group`, `seed`, ...
`importer` runs any, a class or its import path.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from mtl_dist.data.manifest import Manifest
from mtl_dist.errors import UserError
from mtl_dist.importers import run
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.registry import IMPORTERS
from mtl_dist.importers.road import importer_class, kinds_in_short, own_settings

_SHARED = [field.name for field in fields(PackOptions)]


def __getattr__(name: str) -> Callable[..., Manifest]:
    if name not in IMPORTERS:
        raise AttributeError(f"module {__name__!r} has no importer {name!r}: {', '.join(__dir__())}")
    return _callable(name, name)


def __dir__() -> list[str]:
    return [*IMPORTERS, "importer"]


def importer(found: str | type[Importer], out: str, **settings: Any) -> Manifest:
    """The dataset `out` by an importer: a class, or its import path.

    Raises:
        UserError: settings that do not fit, or data that cannot be used.
    """
    prepare: Callable[..., Manifest] = _callable("importer", found)
    return prepare(out=out, **settings)


def _callable(name: str, found: str | type[Importer]) -> Callable[..., Manifest]:
    """An importer as a function: its source and `out` by position, everything else by name."""
    by_name = inspect.Parameter.KEYWORD_ONLY
    kind = importer_class(found)
    own = own_settings(kind)
    shared_names = [each for each in _SHARED if each not in own]
    source = [own.pop("source")] if "source" in own else []
    out = inspect.Parameter("out", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [*own, *kinds_in_short(kind), *shared_names]
    offered = [*source, out, *(inspect.Parameter(each, by_name, default=None) for each in names)]
    signature = inspect.Signature(offered, return_annotation=Manifest)

    def prepare(*args: Any, **kwargs: Any) -> Manifest:
        try:
            settings = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise UserError(
                f"prepare.{name}: {error}. Its arguments are {', '.join(signature.parameters)}."
            ) from None
        shared = {key: settings.pop(key) for key in shared_names if key in settings}
        place = settings.pop("out")
        return run(found, place, settings, PackOptions(**shared))

    prepare.__name__, prepare.__doc__ = name, kind.__doc__
    prepare.__signature__ = signature  # type: ignore[attr-defined]
    return prepare
