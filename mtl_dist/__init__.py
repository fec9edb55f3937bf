"""Train one vision model for many tasks on sharded data, on any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_dist.predictor import Predictor, load

__version__ = "0.1.0"

__all__ = ["Predictor", "load"]


def __getattr__(name: str) -> object:
    # `import mtl_dist` must not import torch: the command line answers in half a second.
    if name in __all__:
        from mtl_dist import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
