"""The partition of positions into the batches of the ranks: arithmetic only.

A training step consumes one global batch of consecutive positions. It is divided first into the micro-batches
of the accumulation, then among the ranks, so each rank's micro-batch is one run of positions, and another
number of ranks divides the same stream at other places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_dist.errors import UserError


def micro_batch_size(global_batch: int, num_ranks: int, accumulation: int) -> int:
    """The samples of one forward on one rank.

    Raises:
        UserError: the global batch does not divide into the ranks' micro-batches.
    """
    parts = num_ranks * accumulation
    if global_batch % parts:
        raise UserError(
            f"train.global_batch: expected a multiple of ranks x accumulation = {num_ranks} x "
            f"{accumulation} = {parts}, found {global_batch}."
        )
    return global_batch // parts


@dataclass(frozen=True)
class TrainingPartition:
    """One rank's micro-batches of the positions from `start` up to `end`, in order.

    The last global batch is filled up with positions from `end` on: padding.

    Raises:
        UserError: the global batch does not divide into the ranks' micro-batches.
    """

    global_batch: int
    accumulation: int
    rank: int
    world_size: int
    start: int
    end: int

    def __post_init__(self) -> None:
        micro_batch_size(self.global_batch, self.world_size, self.accumulation)

    @property
    def batch_size(self) -> int:
        """The samples of a micro-batch."""
        return micro_batch_size(self.global_batch, self.world_size, self.accumulation)

    def __len__(self) -> int:
        num_steps = -(-max(0, self.end - self.start) // self.global_batch)
        return num_steps * self.accumulation

    def positions(self, index: int) -> np.ndarray:
        """The positions of the micro-batch, int64 (B,); those from `end` on are padding."""
        step, part = divmod(index, self.accumulation)
        number = part * self.world_size + self.rank
        first = self.start + step * self.global_batch + number * self.batch_size
        return np.arange(first, first + self.batch_size)

    def content(self, positions: np.ndarray) -> np.ndarray:
        """Where the content of each position comes from: padding repeats the real part of its global batch.

        Repeating keeps the statistics of a batch norm near those of real images.
        """
        first = self.start + (positions[0] - self.start) // self.global_batch * self.global_batch
        return np.where(positions < self.end, positions, first + (positions - first) % (self.end - first))


@dataclass(frozen=True)
class EvaluationPartition:
    """One rank's batches of a split in its natural order: every sample once, equally many batches each."""

    batch_size: int
    rank: int
    world_size: int
    end: int
    """The number of samples; positions beyond it are padding."""

    def __len__(self) -> int:
        return -(-self.end // (self.batch_size * self.world_size))

    def positions(self, index: int) -> np.ndarray:
        """The positions of the batch, int64 (B,); those from `end` on are padding."""
        first = (index * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size)

    def content(self, positions: np.ndarray) -> np.ndarray:
        """Where the content of each position comes from: padding repeats the split."""
        return positions % self.end
