"""What the features are called where a backbone meets the heads, and which of them a head asks for."""

from __future__ import annotations

from dataclasses import dataclass

VECTOR = "vector"


def map_key(stride: int) -> str:
    """The name of the map at `stride` among a backbone's features."""
    return f"stride_{stride}"


def block_key(number: int) -> str:
    """The name of the map of a plain ViT's block, counted from 1."""
    return f"block_{number}"


def prefix_key(number: int) -> str:
    """The name of the tokens (B, P, D) that stand before the patches after a block: the class token first."""
    return f"block_{number}_prefix"


@dataclass(frozen=True)
class Blocks:
    """What a plain ViT can give of each of its blocks: a map, and the tokens before it.

    `own_stride_from` is the block whose map is the one at `stride` among the features.
    """

    number: int
    stride: int
    channels: int
    num_prefix: int
    own_stride_from: int

    def name(self, number: int) -> str:
        """The feature that is the map of this block."""
        return map_key(self.stride) if number == self.own_stride_from else block_key(number)


@dataclass(frozen=True)
class Wanted:
    """The maps that heads read: at these strides; of these blocks of a plain ViT; the tokens before those."""

    strides: frozenset[int] = frozenset()
    blocks: frozenset[int] = frozenset()
    prefixes: frozenset[int] = frozenset()

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(
            self.strides | other.strides, self.blocks | other.blocks, self.prefixes | other.prefixes
        )

    def __bool__(self) -> bool:
        return bool(self.strides or self.blocks)
