"""The importers from Python, each as the command of its name: `mtl_dist.prepare.folders(...)`.

import mtl_dist

mtl_dist.prepare.digits("data/digits")
mtl_dist.prepare.folders("photos", "data/breeds", task="breed", val=0.1, seed=3)

Besides an importer's own arguments each takes `seed`, `workers`, `max_skipped` and `verify`. Paths may be
text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mtl_dist.data.manifest import Manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.packing import PackOptions

IMPORTERS: dict[str, str] = {
    "digits": "digits",
    "folders": "folders",
    "table": "table",
    "idx": "idx",
    "cifar": "cifar",
    "stacks": "stacks",
    "own": "importer",
}
"""The modules that have `prepare_<name>`."""


def __getattr__(name: str) -> Callable[..., Manifest]:
    if name not in IMPORTERS:
        raise AttributeError(f"module {__name__!r} has no importer {name!r}: {', '.join(IMPORTERS)}")
    module = import_module(f"mtl_dist.importers.{IMPORTERS[name]}")
    return _callable(name, getattr(module, f"prepare_{name}"))


def __dir__() -> list[str]:
    return list(IMPORTERS)


def _callable(name: str, function: Callable[..., Manifest]) -> Callable[..., Manifest]:
    """`function` with PackOptions' fields in place of `options`, and text for paths."""
    signature = inspect.signature(function)
    hints = get_type_hints(function)
    packing = inspect.signature(PackOptions).parameters
    own = [each for key, each in signature.parameters.items() if key not in ("options", "progress")]
    shared = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in packing.values()]
    offered = signature.replace(parameters=[*own, *shared])

    def prepare(*args: Any, **kwargs: Any) -> Manifest:
        try:
            arguments = offered.bind(*args, **kwargs).arguments
        except TypeError as error:
            names = ", ".join(offered.parameters)
            raise UserError(f"prepare.{name}: {error}. Its arguments are {names}.") from None
        for key, value in arguments.items():
            if isinstance(value, str) and Path in (hints.get(key), *get_args(hints.get(key))):
                arguments[key] = Path(value)
        options = {key: arguments.pop(key) for key in packing if key in arguments}
        return function(**arguments, options=PackOptions(**options))

    prepare.__name__, prepare.__doc__ = name, function.__doc__
    prepare.__signature__ = offered  # type: ignore[attr-defined]
    return prepare
