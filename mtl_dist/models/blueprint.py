"""What a way of sharing is built from: the settings of the model, and what the tasks want of it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from mtl_dist.models.backbones import AnyBackbone, AnyNetwork, build_network, make_backbone
from mtl_dist.models.features import VECTOR, Wanted, map_key
from mtl_dist.models.heads import Head, build_head, wanted_maps
from mtl_dist.models.settings import DecoderNorm, ModelSettings
from mtl_dist.specs import HeadSpec


@dataclass(frozen=True)
class Blueprint:
    """Makes networks, backbones and heads as `model` and the tasks say.

    Untrained weights are drawn from torch's global generator, in the order in which they are made.

    Args:
        settings: what the recipe says under `model`
        specs: by task, what it wants of its head
        image_size: (H, W)
        mean, std: of the images, per channel
    """

    settings: ModelSettings
    specs: Mapping[str, HeadSpec]
    in_channels: int
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def tasks(self) -> list[str]:
        """Their names, in order."""
        return list(self.specs)

    def network(self) -> AnyNetwork:
        """A new network, with its weights."""
        return build_network(self.settings, self.in_channels, self.image_size)

    def strides(self, task: str, channels: Mapping[int, int]) -> set[int]:
        """The strides of the maps that the task's head reads, out of those of `channels`."""
        return set(wanted_maps(self.settings, self.specs[task], channels).strides)

    def strides_by_task(self, channels: Mapping[int, int]) -> dict[str, set[int]]:
        """The strides of the maps that each task reads; a vector head takes the mean over the deepest one."""
        deepest = {max(channels)}
        return {task: self.strides(task, channels) or deepest for task in self.specs}

    @property
    def norm(self) -> DecoderNorm:
        """The normalisation of what is made beside the backbone."""
        return self.settings.made_norm

    def cut(self, network: AnyNetwork, tasks: Collection[str]) -> tuple[AnyBackbone, dict[str, Head]]:
        """The backbone that gives what the heads of `tasks` read, and these heads."""
        channels, blocks = network.channels, network.blocks
        each = (wanted_maps(self.settings, self.specs[task], channels, blocks) for task in tasks)
        wanted = reduce(operator.or_, each)
        vector_name = network.vector_name(with_maps=bool(wanted))
        has_vector_head = any(self.specs[task].layout == "vector" for task in tasks)
        if has_vector_head and vector_name != VECTOR:
            wanted |= Wanted(frozenset(stride for stride in channels if map_key(stride) == vector_name))
        size = network.vector_size
        heads = {
            task: build_head(self.settings, self.specs[task], channels, size, vector_name, blocks)
            for task in tasks
        }
        vector = has_vector_head and vector_name == VECTOR
        return make_backbone(network, wanted, vector, self.settings), heads

    def head(self, task: str, channels: Mapping[int, int], vector_size: int, vector_name: str) -> Head:
        """The head of a task.

        Args:
            channels: by stride, of the maps that it may read
            vector_size: of the vector
            vector_name: the feature that a vector head reads; of a map it takes the mean
        """
        return build_head(self.settings, self.specs[task], channels, vector_size, vector_name)

    def backbone(self, network: AnyNetwork, strides: Collection[int], vector: bool) -> AnyBackbone:
        """The part of a network that gives these features; the network's submodules move in there."""
        return make_backbone(network, Wanted(frozenset(strides)), vector, self.settings)
