"""A model in words: its features, outputs and parameters, for `--debug` and logs."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mtl_dist.config.describe import listed
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.tracing import on_meta
from mtl_dist.models.weights import is_adapter

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def describe(model: MultitaskModel, image_size: tuple[int, int]) -> str:
    """The features' and outputs' sizes for images of `image_size` (H, W), and the parameters of each part.

    Computed on the meta device: it costs no memory and works wherever the model lies.
    """
    channels = model.mean.shape[1]
    image = torch.empty(1, channels, *image_size, device="meta")
    features, outputs = on_meta(_Shapes(model), image)
    lines = [
        f"images: {_size((channels, *image_size))}, mean {_values(model.mean)}, std {_values(model.std)}"
    ]
    lines += [f"{name}: {_count(part.parameters())}" for name, part in model.trunk().items()]
    lines += [f"    {name:<10}  {_size(shape)}" for name, shape in features.items()]
    for task, head in model.heads.items():
        reads = ", ".join(model.feature_names(task))
        lines.append(f"head {task}: {_count(head.parameters())}, {reads} -> {_size(outputs[task])}")
    lines.append(f"in all: {_count(model.parameters())}")
    return "\n".join(lines)


def parameters_in_words(module: nn.Module) -> str:
    """How many parameters there are, how many of them train, and which parts are frozen.

    A part is frozen where none of its parameters trains: `backbone`, `heads.age`.
    """
    named = dict(module.named_parameters())
    words = f"{sum(parameter.numel() for parameter in named.values()):,} parameters"
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    if not frozen:
        return words
    training = sum(parameter.numel() for name, parameter in named.items() if name not in frozen)
    adapters = {name for name in named if is_adapter(name)}
    named = {name: parameter for name, parameter in named.items() if name not in adapters}
    parts: list[str] = []
    for name in named:
        outer = [name.rsplit(".", cut)[0] for cut in range(name.count("."), 0, -1)]
        whole = next((part for part in outer if _all_in(part, named, frozen)), name)
        if name in frozen and whole not in parts:
            parts.append(whole)
    shown = [part.removeprefix("model.") for part in parts]
    but = ", but for adapters" if adapters else ""
    return f"{words}, of which {training:,} train; frozen: {listed(shown)}{but}"


def _all_in(part: str, named: Iterable[str], frozen: Set[str]) -> bool:
    return all(name in frozen for name in named if name.startswith(f"{part}."))


class _Shapes(nn.Module):
    """Gives the shapes of the features and the outputs, without the batch; a module to swap weights in."""

    def __init__(self, model: MultitaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> tuple[Shapes, Shapes]:
        features = self.model.features(images_BCHW)
        outputs = self.model.heads_forward(features, (images_BCHW.shape[2], images_BCHW.shape[3]))
        return (
            {name: tuple(feature.shape[1:]) for name, feature in features.items()},
            {task: tuple(output.shape[1:]) for task, output in outputs.items()},
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _count(parameters: Iterable[nn.Parameter]) -> str:
    """The number of parameters, and how many of them are frozen."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    frozen = sum(size for size, trained in sizes if not trained)
    return f"{sum(size for size, _ in sizes):,} parameters" + (
        f", {frozen:,} of them frozen" if frozen else ""
    )


def _values(buffer: Tensor) -> str:
    return "/".join(f"{value:.4g}" for value in buffer.flatten().tolist())
