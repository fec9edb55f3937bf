"""The check of a run's shards: one process of each machine compares them with their hashes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mtl_dist.data.loader import Data
from mtl_dist.data.shard_check import ShardCheck, local_shards
from mtl_dist.engine.world import World


def checking_shards(
    data: Data, splits: Iterable[str], world: World, say: Callable[[str], None]
) -> ShardCheck:
    """The check of the shards of these splits, to be entered; of no shard where another process has it."""
    sources = [source for split in splits for source in data.sources.get(split, ())]
    shards = local_shards(sources) if world.local_rank == 0 else []
    ends = data.settings.on_bad_sample.kind == "fail"
    return ShardCheck(shards, world.rank / world.size, say, ends=ends)
