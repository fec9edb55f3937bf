"""Balancing methods; from Python each by its class: `mtl_dist.balance.CAGrad(c=0.4).weights(gramian_TT)`."""

from __future__ import annotations

from importlib import import_module


def __getattr__(name: str) -> object:
    if name[:1].isupper():
        methods = import_module("mtl_dist.balance.methods")
        found = getattr(methods, name, None)
        if isinstance(found, type) and issubclass(found, methods.Method):
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
