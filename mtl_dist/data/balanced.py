"""Class-balanced sampling: every class equally often, whatever its number of samples.

The stream is cut into blocks as long as there are classes, and each block holds one sample of every class, in
an order of its own: so block b is the b-th draw of every class, and after any number of draws two classes
differ by one at most. A class of n samples goes through them in epochs of n draws, each a new permutation.
All of it is arithmetic on the position; nothing is held but the rows, sorted by class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtl_dist.data.mixing import Samples
from mtl_dist.randomness import derive_key, derive_keys, permute

_BLOCKS, _EPOCHS = 1, 2  # what a key made from the stream's is for


class BalancedStream:
    """The endless stream of training samples, balanced over the classes that have any.

    Args:
        classes: for each source the class of each row, or a negative number for a row never to be drawn.
        key: decides the order.
    """

    def __init__(self, classes: Sequence[np.ndarray], key: int) -> None:
        self._ends = np.cumsum([len(column) for column in classes], dtype=np.int64)
        self.num_samples = int(self._ends[-1])
        everything = np.concatenate(classes)
        rows = np.argsort(everything, kind="stable")
        unlabelled = int((everything < 0).sum())
        small = self.num_samples < 2**32
        self._rows = rows[unlabelled:].astype(np.uint32 if small else np.int64)
        _, self._sizes = np.unique(everything[self._rows], return_counts=True)
        assert len(self._sizes), "no row has a class"
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._block_key = np.uint64(derive_key(key, _BLOCKS))
        self._epoch_key = np.uint64(derive_key(key, _EPOCHS))

    @property
    def num_classes(self) -> int:
        """The classes that have samples."""
        return len(self._sizes)

    def samples(self, positions: np.ndarray) -> Samples:
        """The samples at these positions; the epoch of each is that of its class."""
        draws, offsets = np.divmod(positions, self.num_classes)
        lengths = np.full_like(offsets, self.num_classes)
        classes = permute(offsets, lengths, derive_keys(self._block_key, draws))
        sizes = self._sizes[classes]
        epochs, indices = np.divmod(draws, sizes)
        indices = permute(indices, sizes, derive_keys(derive_keys(self._epoch_key, classes), epochs))
        rows = self._rows[self._starts[classes] + indices].astype(np.int64)
        sources = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends])
        return Samples(sources, epochs, rows - starts[sources])
