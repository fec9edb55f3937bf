"""Shards fetched into the cache before they are read.

While the samples of one window are read, a thread of every process that loads fetches the shards of the next
one. The processes of a node want the same shards: each process begins at another place in the list, and waits
for a shard that another one is fetching, so each shard comes once. A fetch that fails here is tried again
when the shard is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress

from mtl_dist.data.cache import CacheSettings
from mtl_dist.data.reader import SplitReader
from mtl_dist.errors import UserError

Shard = tuple[int, int]
"""The number of a source, and of a shard of its split."""


class ShardPrefetch:
    """Fetches shards of some readers into their cache, in a thread of the process that asks."""

    def __init__(self, readers: Sequence[SplitReader], cache: CacheSettings) -> None:
        self._readers = readers
        self._max_bytes = cache.max_bytes
        self._wanted: list[Shard] = []
        self._thread = threading.Thread()

    def want(self, shards: list[Shard]) -> None:
        """Fetch these shards from now on, and no longer those that were wanted before.

        No shard is fetched before its time where this window and the next would not both fit into the cache.
        """
        if shards == self._wanted:
            return
        self._wanted = shards
        size = sum(self._readers[source].remote_bytes(shard) for source, shard in shards)
        if size == 0 or 2 * size > self._max_bytes:
            return
        # A daemon: a process that ends does not wait for it, and leaves no more than a partial file.
        self._thread = threading.Thread(target=self._fetch, args=(shards,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the wanted shards are in the cache."""
        if self._thread.ident is not None:
            self._thread.join()

    def _fetch(self, shards: list[Shard]) -> None:
        first = os.getpid() % len(shards)
        for source, shard in shards[first:] + shards[:first]:
            if self._wanted is not shards:
                return
            with suppress(UserError):
                self._readers[source].fetch(shard)
