"""How many values BatchNorm has per channel to take its statistics from: one is none."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

FEW = 4
"""From so many values on, a channel is not merely told above its mean from below."""


def fewest_values(model: nn.Module, image_BCHW: Tensor) -> tuple[str, int] | None:
    """The BatchNorm layer in training that sees the fewest values per channel and image, and how many.

    `image_BCHW` is one image of the size that is trained with. None where no such layer is reached.
    """
    seen: dict[str, int] = {}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].numel() // inputs[0].shape[1]
        seen[name] = min(values, seen.get(name, values))

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    }
    handles = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(image_BCHW)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    if not seen:
        return None
    name = min(seen, key=lambda one: seen[one])
    return name, seen[name]
