"""The part of a network of timm that gives the wanted features.

Parameters keep timm's names behind `network.`; those of a plain ViT's pyramid are behind `pyramid.`.

Shape legend: batch.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.models.checkpointing import Recomputing
from mtl_dist.models.features import VECTOR, Wanted, block_key, map_key, prefix_key
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.timm_library import timm_library
from mtl_dist.models.timm_network import TimmNetwork, intermediates

_PROBE_SIZE = 128
"""A side, at least, of the image by which unused parameters are found."""


class TimmBackbone(nn.Module):
    """The features of a network of timm.

    Args:
        source: the network; its submodules move in here
        wanted: the maps
        vector: whether the vector is wanted, the mean over the deepest map
    """

    def __init__(self, source: TimmNetwork, wanted: Wanted, vector: bool, settings: ModelSettings) -> None:
        super().__init__()
        self.network = source.module
        self.pyramid = nn.ModuleDict(
            {key: level for key, level in source.pyramid.items() if int(key) in wanted.strides}
        )
        self._sources = {stride: source.sources[stride] for stride in sorted(wanted.strides)}
        self._blocks, self._prefixes = sorted(wanted.blocks), sorted(wanted.prefixes)
        self._pooled = source.sources[source.vector_stride] if vector else None
        self._sizes = source.sizes
        numbers = {number - 1 for number in (*self._blocks, *self._prefixes)}
        numbers |= set() if self._pooled is None else {self._pooled}
        indices = sorted(numbers | set(self._sources.values()))
        source.module.prune_intermediate_layers(indices, prune_norm=not source.is_plain, prune_head=True)  # type: ignore[operator]
        self._numbers = indices
        # By its call, for what an engine does around that: it may gather the parameters of a module there.
        source.module.forward = _Intermediates(
            source.module, indices, source.is_plain, with_prefix=bool(self._prefixes)
        )
        self._freeze_unreached(source)
        if settings.checkpointing != "off":
            for module in _blocks(self.network, coarse=settings.checkpointing == "stage"):
                module.forward = Recomputing(module)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the features that `forward` gives."""
        vector = () if self._pooled is None else (VECTOR,)
        blocks = (*map(block_key, self._blocks), *map(prefix_key, self._prefixes))
        return (*vector, *map(map_key, self._sources), *blocks)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The features of normalised images, as wanted: `vector` (B, D); `stride_<s>` and `block_<n>`
        (B, D, H, W); `block_<n>_prefix` (B, P, D)."""
        found, before = self.network(self._sizes.fit(images_BCHW))
        maps = dict(zip(self._numbers, found, strict=True))
        prefixes = dict(zip(self._numbers, before, strict=True)) if self._prefixes else {}
        features = {}
        for stride, number in self._sources.items():
            key = str(stride)
            # A tensor of its own in the graph: its gradient is that of the heads which read it, without what
            # comes back from the deeper layers.
            features[map_key(stride)] = (
                self.pyramid[key](maps[number]) if key in self.pyramid else maps[number].view_as(maps[number])
            )
        for number in self._blocks:
            features[block_key(number)] = maps[number - 1].view_as(maps[number - 1])
        for number in self._prefixes:
            features[prefix_key(number)] = prefixes[number - 1].view_as(prefixes[number - 1])
        if self._pooled is not None:
            features[VECTOR] = maps[self._pooled].mean(dim=(2, 3))
        return features

    def parameters_by_layer(self) -> list[list[nn.Parameter]]:
        """The parameters layer by layer, from the image on, as timm groups them; a pyramid comes last."""
        groups = _groups(self.network, coarse=False)
        layers = [[self.network.get_parameter(name) for name in names] for names in groups]
        layers.append(list(self.pyramid.parameters()))
        return [layer for layer in layers if layer]

    def undecayed(self) -> set[nn.Parameter]:
        """What timm does not decay although it has several dimensions: position embeddings, tokens."""
        names = set(getattr(self.network, "no_weight_decay", set)())
        return {parameter for name, parameter in self.network.named_parameters() if name in names}

    def _freeze_unreached(self, source: TimmNetwork) -> None:
        """What no feature comes from does not train: a token that only a classifier reads."""
        size = source.sizes.fixed or source.sizes.fitted((_PROBE_SIZE, _PROBE_SIZE))
        some = next(self.parameters())
        modes = {part: part.training for part in self.modules()}
        self.eval()
        with torch.enable_grad():
            features = self(some.new_zeros(1, source.in_channels, *size))
        for part, mode in modes.items():
            part.training = mode
        reached = _leaves(features.values())
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in reached)


def _leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The parameters that the outputs' graph begins at."""
    found, seen = set(), set()
    ahead = [output.grad_fn for output in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        ahead += [function for function, _ in node.next_functions]
    return found


class _Intermediates:
    """In place of a network's `forward`: its maps of these numbers, and the tokens before them if wanted."""

    def __init__(self, module: nn.Module, indices: list[int], normalised: bool, *, with_prefix: bool) -> None:
        self.module, self.indices, self.normalised = module, indices, normalised
        self.with_prefix = with_prefix

    def __call__(self, images_BCHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return intermediates(self.module, images_BCHW, self.indices, self.normalised, self.with_prefix)


def _groups(network: nn.Module, coarse: bool) -> list[list[str]]:
    """The names of the parameters by layer, or by stage, in timm's order."""
    matcher: Any = network.group_matcher(coarse=coarse)  # type: ignore[operator]
    found: Mapping[int, list[str]] = timm_library().models.group_parameters(network, matcher)
    return [found[number] for number in sorted(found)]


def _blocks(network: nn.Module, coarse: bool) -> list[nn.Module]:
    """The modules whose inside is worth computing again: those that hold a whole group of layers."""
    blocks = []
    for names in _groups(network, coarse):
        parts = _common([name.split(".")[:-1] for name in names])
        module = network.get_submodule(".".join(parts))
        if parts and any(True for _ in module.children()) and not isinstance(module, nn.ModuleList):
            blocks.append(module)
    return blocks


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    """What all paths begin with."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False))
    return [column[0] for column in columns]
