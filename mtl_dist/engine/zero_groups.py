"""Where DeepSpeed's ZeRO optimizers keep what: the flat tensors that the torch optimizer updates.

This is the one place that reads their inner structure (`bit16_groups`, `fp16_groups`, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.engine.engine import counter_device
from mtl_dist.engine.partitions import Layout, contiguous_layout, interleaved_layout
from mtl_dist.engine.world import World


@dataclass(frozen=True, eq=False)
class FlatGroup:
    """This rank's shard of some parameters, in one flat float32 tensor.

    `flat` is what the torch optimizer sees; `layout` says what is in it, on every rank.
    """

    parameters: tuple[nn.Parameter, ...]
    shapes: Mapping[str, torch.Size]
    flat: Tensor
    layout: Layout
    counter_device: torch.device


def separate_groups(optimizer: torch.optim.Optimizer, parts: Iterable[Sequence[nn.Parameter]]) -> None:
    """Split the optimizer's groups so that none holds parameters of two `parts`.

    A part is what is absent together. Whatever is in no part stays together, group by group.
    """
    part_of = {parameter: number for number, part in enumerate(parts) for parameter in part}
    groups = []
    for group in optimizer.param_groups:
        by_part: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_part.setdefault(part_of.get(parameter, -1), []).append(parameter)
        groups += [group | {"params": parameters} for parameters in by_part.values()]
    optimizer.param_groups[:] = groups


def partitioned_groups(zero: Any, names: Mapping[nn.Parameter, str], world: World) -> list[FlatGroup]:
    """The flat groups of a ZeRO 1 or 2 optimizer: parameters in a row, cut into equal partitions."""
    groups = []
    for parameters, flat, settings in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, zero.param_groups, strict=True
    ):
        shapes = {names[p]: p.shape for p in parameters}
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        layout = contiguous_layout(sizes, flat.numel(), world.size)
        groups.append(FlatGroup(tuple(parameters), shapes, flat, layout, counter_device(settings, flat)))
    return groups


def sharded_groups(zero: Any, names: Mapping[nn.Parameter, str], world: World) -> list[FlatGroup]:
    """The flat groups of a ZeRO 3 optimizer: every parameter cut into equal parts."""
    groups = []
    for number, (parameters, flat) in enumerate(
        zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    ):
        shapes = {names[p]: p.ds_shape for p in parameters}
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        settings = zero.param_groups[zero.sub_group_to_group_id[number]]
        layout = interleaved_layout(sizes, world.size)
        groups.append(FlatGroup(tuple(parameters), shapes, flat, layout, counter_device(settings, flat)))
    return groups
