"""Modules that take seconds to import, imported when something of them is first used.

    from mtl_dist.lazy import torch

A recipe is read, checked and shown without torch, although its settings stand beside the code that trains.
Only classes that derive from a class of torch cannot wait: their modules import torch themselves, and no
module of settings imports them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    """Stands for the module of its name."""

    _loaded: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if self._loaded is None:
            self._loaded = import_module(self.__name__)
        return getattr(self._loaded, name)


if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional
    import torchvision.transforms.v2

    F = torch.nn.functional
    vision = torchvision.transforms.v2
else:
    torch = _Lazy("torch")
    F = _Lazy("torch.nn.functional")
    vision = _Lazy("torchvision.transforms.v2")
