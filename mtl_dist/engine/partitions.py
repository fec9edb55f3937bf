"""Flat tensors that are divided over the ranks, as ZeRO keeps them, and how whole tensors come out of them.

    rank 0   [ weight 0..7 | bias 0..3 | other 0..2 ]     a flat tensor of the same size on every rank;
    rank 1   [ other 3..8                 | padding ]     segments say which piece of what is where

Whole tensors exist on the host of rank 0 alone; a piece at a time travels there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist.engine.world import World

PIECE = 2**23
"""Elements that each rank sends at a time: 32 MB, large enough for the network, small beside a model."""


@dataclass(frozen=True)
class Segment:
    """`length` elements of a rank's flat tensor from `start` are those of parameter `name` from `offset`."""

    name: str
    start: int
    offset: int
    length: int


Layout = Sequence[Sequence[Segment]]
"""The segments of every rank, by rank."""


def contiguous_layout(sizes: Mapping[str, int], partition_size: int, num_ranks: int) -> Layout:
    """The parameters one after another, cut into `num_ranks` partitions of `partition_size` elements.

    >>> contiguous_layout({"a": 3, "b": 4}, 4, 2)[1]
    [Segment(name='b', start=0, offset=1, length=3)]
    """
    layout: list[list[Segment]] = [[] for _ in range(num_ranks)]
    begin = 0
    for name, size in sizes.items():
        for rank in range(num_ranks):
            low = max(begin, rank * partition_size)
            high = min(begin + size, (rank + 1) * partition_size)
            if low < high:
                layout[rank].append(Segment(name, low - rank * partition_size, low - begin, high - low))
        begin += size
    return layout


def interleaved_layout(sizes: Mapping[str, int], num_ranks: int) -> Layout:
    """Every parameter cut into `num_ranks` equal parts (the last ones padded), a rank's parts in a row.

    >>> interleaved_layout({"a": 3, "b": 4}, 2)[1]
    [Segment(name='a', start=0, offset=2, length=1), Segment(name='b', start=2, offset=2, length=2)]
    """
    layout: list[list[Segment]] = [[] for _ in range(num_ranks)]
    begin = 0
    for name, size in sizes.items():
        part = -(-size // num_ranks)
        for rank in range(num_ranks):
            length = min(part, size - rank * part)
            if length > 0:
                layout[rank].append(Segment(name, begin, rank * part, length))
        begin += part
    return layout


def gather(flat: Tensor, layout: Layout, whole: Mapping[str, Tensor], world: World) -> None:
    """Collective: fill the host tensors `whole` on rank 0 (elsewhere unused) from every rank's `flat`."""
    for begin, pieces in _pieces(flat, world):
        for segments, piece in zip(layout, pieces, strict=False):
            host_piece = piece.to("cpu")
            end = begin + piece.numel()
            for segment in segments:
                low, high = max(begin, segment.start), min(end, segment.start + segment.length)
                if low < high:
                    place = segment.offset + low - segment.start
                    whole[segment.name].view(-1)[place : place + high - low] = host_piece[
                        low - begin : high - begin
                    ]


def _pieces(flat: Tensor, world: World) -> Iterator[tuple[int, list[Tensor]]]:
    """Every piece's place, and the piece of each rank (on rank 0; elsewhere none)."""
    # Tensors on a GPU travel over the engine's group (NCCL), tensors on the host over gloo.
    group = None if flat.is_cuda else world.control
    flat = flat.detach().view(-1)
    for begin in range(0, flat.numel(), PIECE):
        piece = flat[begin : begin + PIECE].contiguous()
        if world.size == 1:
            yield begin, [piece]
            continue
        pieces = [torch.empty_like(piece) for _ in range(world.size)] if world.is_main else []
        dist.gather(piece, pieces if world.is_main else None, dst=0, group=group)
        yield begin, pieces


def scatter(flat: Tensor, segments: Sequence[Segment], whole: Mapping[str, Tensor]) -> None:
    """Fill this rank's `flat` from the whole tensors; padding becomes 0."""
    flat = flat.detach().view(-1).zero_()
    for segment in segments:
        source = whole[segment.name].reshape(-1)[segment.offset : segment.offset + segment.length]
        flat[segment.start : segment.start + segment.length] = source.to(flat.device)
