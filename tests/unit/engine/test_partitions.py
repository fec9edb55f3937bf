"""Flat tensors over ranks: each element of each parameter is in exactly one place, and comes back from it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.engine import partitions
from mtl_dist.engine.partitions import Layout, contiguous_layout, gather, interleaved_layout, scatter
from mtl_dist.engine.world import World

sizes_of_parameters = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
    lambda sizes: {f"p{number}": size for number, size in enumerate(sizes)}
)
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def padded(total: int, num_ranks: int) -> int:
    """The partition size that ZeRO 1 and 2 choose: a multiple of two elements."""
    return -(-total // (2 * num_ranks)) * 2


def assert_each_element_once(layout: Layout, sizes: dict[str, int], flat_sizes: list[int]) -> None:
    seen = {name: torch.zeros(size, dtype=torch.int) for name, size in sizes.items()}
    for segments, flat_size in zip(layout, flat_sizes, strict=True):
        used = torch.zeros(flat_size, dtype=torch.int)
        for segment in segments:
            used[segment.start : segment.start + segment.length] += 1
            seen[segment.name][segment.offset : segment.offset + segment.length] += 1
        assert int(used.max()) <= 1
    for name, count in seen.items():
        assert bool((count == 1).all()), name


@given(sizes_of_parameters, st.integers(1, 5))
def test_a_row_of_parameters_is_cut_without_loss(sizes: dict[str, int], num_ranks: int) -> None:
    size = padded(sum(sizes.values()), num_ranks)
    assert_each_element_once(contiguous_layout(sizes, size, num_ranks), sizes, [size] * num_ranks)


@given(sizes_of_parameters, st.integers(1, 5))
def test_parameters_cut_one_by_one_are_cut_without_loss(sizes: dict[str, int], num_ranks: int) -> None:
    size = sum(-(-size // num_ranks) for size in sizes.values())
    assert_each_element_once(interleaved_layout(sizes, num_ranks), sizes, [size] * num_ranks)


@settings(deadline=None)
@given(sizes_of_parameters, st.integers(1, 50))
def test_what_is_scattered_is_gathered_whatever_the_pieces(sizes: dict[str, int], piece: int) -> None:
    whole = {name: torch.randn(size).view(1, size) for name, size in sizes.items()}
    total = sum(sizes.values())
    layout = contiguous_layout(sizes, padded(total, 1), 1)
    flat = torch.full((padded(total, 1),), torch.nan)
    scatter(flat, layout[0], whole)
    assert bool((flat[total:] == 0).all())
    back = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    kept, partitions.PIECE = partitions.PIECE, piece
    try:
        gather(flat, layout, back, ALONE)
    finally:
        partitions.PIECE = kept
    assert all(torch.equal(back[name], tensor) for name, tensor in whole.items())
