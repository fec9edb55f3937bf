"""Prefetching shards: the next window's are in the cache before they are read, and nothing hangs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_dist.data.loader import BatchLoader, open_data, train_loader
from mtl_dist.data.mixing import Schedule, Stream
from mtl_dist.data.order import Order
from mtl_dist.data.settings import DataSettings
from tests.tiny_datasets import TASKS, write_dataset

TRAIN, SHARD = 40, 5


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    window=st.sampled_from([1, 2, 3, "full", "off"]),
    start=st.integers(0, 30),
)
def test_what_comes_up_is_what_the_next_window_reads(sizes: list[int], window: Any, start: int) -> None:
    order = Order(sizes, window, key=3)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    length = 1 if window == "off" else len(sizes) if window == "full" else window
    epoch, position = divmod(start, order.num_samples)
    visited = []  # the windows' shards from here on, over two epochs
    for number in (epoch, epoch + 1):
        shards = list(dict.fromkeys(shard_of[order.sample_at(number, np.arange(order.num_samples))].tolist()))
        ends = (
            np.cumsum([sizes[shard] for shard in order.epoch(number).shards])
            if window != "off"
            else np.cumsum(sizes)
        )
        of_window = order.epoch(number).shards.tolist() if window != "off" else shards
        visited += [
            (set(of_window[i : i + length]), number, int(ends[min(i + length, len(sizes)) - 1]))
            for i in range(0, len(sizes), length)
        ]
        assert set(shards) == set(of_window)
    here = next(
        i
        for i, (_, number, end) in enumerate(visited)
        if (number, position) < (number, end) and number == epoch
    )
    expected = visited[here + 1][0] if len(visited) > 2 else set()
    assert set(order.upcoming(epoch, position)) == expected


def test_of_several_sources_each_has_its_own_window() -> None:
    orders = [Order([2] * 4, 2, 1), Order([2] * 6, 2, 2)]
    stream = Stream(orders, Schedule([8, 12]))
    for position in range(45):
        counts = Schedule([8, 12]).counts(position)
        expected = [
            (source, shard)
            for source in (0, 1)
            for shard in orders[source].upcoming(*divmod(counts[source], orders[source].num_samples))
        ]
        assert stream.upcoming(position) == expected


def loader(dataset: Path, cache: Path, max_gb: float, **options: Any) -> BatchLoader:
    stated = {
        "train": [{"path": f"file://{dataset}"}],
        "image_size": [8, 10],
        "shuffle_window": 2,
        "cache": {"dir": str(cache), "max_gb": max_gb},
        **options,
    }
    data = open_data(DataSettings.model_validate(stated, strict=False), TASKS)
    return train_loader(
        data, seed=7, global_batch=5, accumulation=1, rank=0, world_size=1, start_position=0,
        end_position=TRAIN, workers=0, pin_memory=False,
    )  # fmt: skip


def shards_in(cache: Path) -> int:
    return sum(path.stat().st_size > 10_000 for path in cache.iterdir() if len(path.name) == 64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("data") / "tiny", {"train": TRAIN, "val": 3}, shard_samples=SHARD
    )


def test_the_next_window_is_in_the_cache_while_this_one_is_read(dataset: Path, tmp_path: Path) -> None:
    batches = loader(dataset, tmp_path / "cache", 1.0)
    iterator = iter(batches)
    next(iterator)
    shard_prefetch = batches.batches.shard_prefetch
    assert shard_prefetch is not None
    shard_prefetch.wait()
    upcoming = batches.batches.order.upcoming(0)  # type: ignore[attr-defined]
    assert len(upcoming) == 2
    assert shards_in(tmp_path / "cache") in (3, 4)  # those two, and one or both of this window
    assert len(list(iterator)) == TRAIN // 5 - 1
    shard_prefetch.wait()
    assert shards_in(tmp_path / "cache") == TRAIN // SHARD


def test_a_cache_too_small_for_two_windows_is_left_to_this_one(dataset: Path, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in dataset.glob("train-*.tar"))
    batches = loader(dataset, tmp_path / "cache", 3.5 * size / 1e9)
    next(iter(batches))
    assert batches.batches.shard_prefetch is not None
    batches.batches.shard_prefetch.wait()
    assert shards_in(tmp_path / "cache") <= 2


def test_what_cannot_be_prefetched_is_reported_when_it_is_read(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_dist.data.reader import SplitReader
    from mtl_dist.errors import UserError

    def fails(self: SplitReader, shard: int) -> None:
        raise UserError("no")

    monkeypatch.setattr(SplitReader, "fetch", fails)
    assert len(list(loader(dataset, tmp_path / "cache", 1.0))) == TRAIN // 5
