"""LoRA: low-rank updates beside the weights of a backbone that is frozen (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). A layer with the weight W gives W x + (alpha / rank) B A x, where A and B
train, and B begins at 0.

The layers are peft's. A backbone's own parameters keep their names, with `base_layer` before the last word;
beside them are `lora_A.default.weight` and `lora_B.default.weight`.

Shape legend: batch.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.config.describe import listed
from mtl_dist.config.nearest import nearest
from mtl_dist.errors import NotInstalledError, UserError
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.tracing import on_meta
from mtl_dist.models.weights import is_adapter

_MADE_HERE = "pyramid."
"""What a backbone of timm has that no published weights have: it trains, as heads do."""


def peft_library() -> ModuleType:
    """peft, imported when something of it is first used.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise NotInstalledError(
            "model.adapter: expected peft, which has the adapters, found it not installed. "
            "Install it: pip install 'mtl-dist[adapters]'."
        ) from None
    return peft


def add_adapters(model: MultitaskModel, settings: ModelSettings, image_size: tuple[int, int]) -> None:
    """Freeze a model's backbones and give each an adapter, which trains.

    With one for each task the backbones have their frozen parameters in common.

    Raises:
        UserError: peft is not installed, or the targets are no layers that can be adapted.
    """
    adapter = settings.adapter
    assert adapter is not None
    peft = peft_library()
    backbones: list[nn.Module] = list(model.all_backbones())
    if adapter.per_task:
        _tie(backbones)
    image = torch.empty(1, model.mean.shape[1], *image_size, device="meta")
    # Of all, before the first is frozen and with it what they have in common.
    layers = [_adaptable(backbone, image) for backbone in backbones]
    for backbone, own in zip(backbones, layers, strict=True):
        names = _chosen(own, adapter.targets, settings.backbone_name)
        config = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules="|".join(map(re.escape, names)),
        )
        trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
        peft.inject_adapter_in_model(config, backbone)
        for name, parameter in backbone.named_parameters():
            made_here = name.startswith(_MADE_HERE) and name in trained
            parameter.requires_grad_(made_here or is_adapter(name))
    model.freeze_backbones(keep=lambda name: name.startswith(_MADE_HERE) or is_adapter(name))


def merge_adapters(model: MultitaskModel) -> None:
    """Add the adapters to the weights that they are beside, in place, and take them away."""
    parents = [parent for backbone in model.all_backbones() for parent in backbone.modules()]
    layers = [
        (parent, name, layer)
        for parent in parents
        for name, layer in parent.named_children()
        if hasattr(layer, "base_layer")
    ]
    for _, _, layer in layers:
        # Before the first is merged: tasks may have it in common.
        base: Any = layer.base_layer
        base.weight = nn.Parameter(base.weight.detach().clone())
    for parent, name, layer in layers:
        merged: Any = layer
        merged.merge()
        parent.add_module(name, merged.base_layer)


def _tie(backbones: Sequence[nn.Module]) -> None:
    """Give all backbones the parameters of the first that has one of each name."""
    first: dict[str, nn.Parameter] = {}
    for backbone in backbones:
        for name, parameter in list(backbone.named_parameters()):
            if name.startswith(_MADE_HERE):
                continue
            path, _, last = name.rpartition(".")
            if name in first:
                setattr(backbone.get_submodule(path), last, first[name])
            else:
                first[name] = parameter
        for name, buffer in backbone.named_buffers():
            known = dict(backbones[0].named_buffers()).get(name)
            if known is not None and known is not buffer and known.shape == buffer.shape:
                buffer.copy_(known)


def _adaptable(backbone: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """The layers that can be adapted: linear ones and convolutions of one group, whose call features pass.

    Some networks read a layer's weight without calling it: an adapter beside it would do nothing.
    """
    found: dict[str, nn.Module] = {}
    handles = []
    for name, module in backbone.named_modules():
        is_layer = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if is_layer and not name.startswith(_MADE_HERE) and module.weight.requires_grad:

            def note(module: nn.Module, _inputs: object, _output: object, name: str = name) -> None:
                found[name] = module

            handles.append(module.register_forward_hook(note))
    on_meta(backbone, image)
    for handle in handles:
        handle.remove()
    return {name: module for name, module in backbone.named_modules() if name in found}


def _chosen(layers: dict[str, nn.Module], targets: Sequence[str] | None, backbone: str) -> list[str]:
    """The names of the layers to adapt: those that the targets name, or all of the more frequent sort."""
    if targets is None:
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        others = [name for name in layers if name not in set(linear)]
        return linear if len(linear) > len(others) else others
    known = list(dict.fromkeys(map(_short, layers)))
    for target in targets:
        if not any(_is_of(name, target) for name in layers):
            near = nearest(target, known)
            hint = f"Did you mean {near}?" if near else "Correct it."
            raise UserError(
                f"model.adapter.targets: expected names of layers of {backbone} that can be adapted "
                f"({listed(known)}), found {target}. {hint}"
            )
    return [name for name in layers if any(_is_of(name, target) for target in targets)]


def _is_of(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short(name: str) -> str:
    """The last word of a layer's name, with the one before where it is a number."""
    words = name.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])
