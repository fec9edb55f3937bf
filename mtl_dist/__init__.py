"""Train one vision model for many tasks on sharded data, on any number of ranks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_dist import balance, prepare
    from mtl_dist.data.as_webdataset import webdataset
    from mtl_dist.errors import ImageError, UserError
    from mtl_dist.face import Run, train
    from mtl_dist.prediction.predictor import Predictor, load

__version__ = "0.1.0"

__all__ = [
    "ImageError",
    "Predictor",
    "Run",
    "UserError",
    "balance",
    "load",
    "prepare",
    "train",
    "webdataset",
]

_HOMES = {
    "ImageError": "errors",
    "Predictor": "prediction.predictor",
    "Run": "face",
    "UserError": "errors",
    "load": "prediction.predictor",
    "train": "face",
    "webdataset": "data.as_webdataset",
}


def __getattr__(name: str) -> object:
    # `import mtl_dist` must not import torch: the command line answers in half a second.
    if name in _HOMES:
        return getattr(import_module(f"mtl_dist.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"mtl_dist.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
