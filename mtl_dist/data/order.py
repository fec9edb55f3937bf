"""The order of one source's samples: a pure function of (key, epoch, position).

Two permutations make it. The shards of the split are permuted, and cut into windows of `shuffle_window`
shards; inside each window the samples are permuted. So a batch mixes the shards of a window while reading
stays within a few files. With the window "full" the whole split is one window; with "off" the order is the
stored one. Nothing is held but the permuted list of shards of the epochs in use: no list of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mtl_dist.randomness import derive_key, hash_array, permutation, permute

ShuffleWindow = Annotated[int, Field(ge=1)] | Literal["off", "full"]

_CACHED_EPOCHS = 2  # a batch may straddle the end of an epoch


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shards as they are visited, and its windows."""

    shards: np.ndarray  # as they are visited
    windows: np.ndarray  # of each window, and the end: its first one of these
    first_rows: np.ndarray  # of each visited shard: the row of its first sample
    starts: np.ndarray  # of each visited shard, and the end: the position of its first sample
    window_starts: np.ndarray
    window_keys: np.ndarray


class Order:
    """The order in which the samples of a split are visited, epoch by epoch."""

    def __init__(self, shard_sizes: Sequence[int], window: ShuffleWindow, key: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._window = window
        self._key = key
        self._epochs: dict[int, _Epoch] = {}
        self.num_samples = int(self._sizes.sum())

    def sample_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The rows of the samples at these positions of an epoch, each in [0, num_samples)."""
        if self._window == "off":
            return positions.copy()
        shards = self.epoch(epoch)
        window = np.searchsorted(shards.window_starts, positions, side="right") - 1
        start, end = shards.window_starts[window], shards.window_starts[window + 1]
        visited = start + permute(positions - start, end - start, shards.window_keys[window])
        shard = np.searchsorted(shards.starts, visited, side="right") - 1
        return shards.first_rows[shard] + visited - shards.starts[shard]

    def upcoming(self, epoch: int, position: int) -> list[int]:
        """The shards of the window after the one at this position of an epoch; none where all are one window.

        In the stored order they are the next shard.
        """
        if self._window == "off":
            shard = int(np.searchsorted(np.cumsum(self._sizes), position, side="right"))
            return [(shard + 1) % len(self._sizes)] if len(self._sizes) > 1 else []
        current = self.epoch(epoch)
        following = int(np.searchsorted(current.window_starts, position, side="right"))
        if len(current.windows) == 2:
            return []
        if following == len(current.windows) - 1:
            current, following = self.epoch(epoch + 1), 0
        begin, end = current.windows[following : following + 2].tolist()
        shards: list[int] = current.shards[begin:end].tolist()
        return shards

    def epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= _CACHED_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._permute_shards(derive_key(self._key, epoch))
        return self._epochs[epoch]

    def _permute_shards(self, key: int) -> _Epoch:
        num_shards = len(self._sizes)
        shards = permutation(key, num_shards)
        starts = np.concatenate([[0], np.cumsum(self._sizes[shards])])
        length = num_shards if self._window == "full" else int(self._window)
        windows = np.append(np.arange(0, num_shards, length), num_shards)
        return _Epoch(
            shards=shards,
            windows=windows,
            first_rows=(np.cumsum(self._sizes) - self._sizes)[shards],
            starts=starts,
            window_starts=starts[windows],
            window_keys=hash_array(np.uint64(key) + np.arange(len(windows) - 1, dtype=np.uint64)),
        )
