"""The first batch at the start of a large epoch, and when resuming at 90% of it.

The epoch is made of sparse files: every shard has its full length and one real sample, and all of its rows in
the index point there. What is timed is everything from opening the dataset to the first batch of 64 in hand;
fresh and resumed runs take turns.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.tables import Findings, Row
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import LabelCounts, Manifest, ShardInfo, SplitInfo, write_manifest
from mtl_dist.data.settings import DataSettings, SourceSettings
from mtl_dist.data.shards import ShardWriter, index_path, save_index
from mtl_dist.specs import TaskInfo

SHARD_SAMPLES = 10_000
SAMPLE_BYTES = 2048
BATCH = 64


def bench_resume(num_samples: int, workers: Sequence[int], repeats: int) -> None:
    """Measure with each number of workers, and print a table of medians."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as folder:
        length = write_sparse_dataset(Path(folder), num_samples)
        for number in workers:
            first_batch(Path(folder), 0, length, number)  # imports, and the page cache
            times: dict[str, list[float]] = {"fresh": [], "resumed": []}
            for _ in range(repeats):
                times["fresh"].append(first_batch(Path(folder), 0, length, number))
                times["resumed"].append(first_batch(Path(folder), length * 9 // 10, length, number))
            fresh, resumed = (1e3 * statistics.median(times[name]) for name in ("fresh", "resumed"))
            rows.append({"workers": number, "fresh": fresh, "at 90%": resumed, "ratio": resumed / fresh})
    title = f"first batch of an epoch of {length:,} samples, ms; medians of {repeats}"
    Findings(title, rows).show(Console())


def first_batch(directory: Path, start: int, length: int, workers: int) -> float:
    """Seconds until the first batch from `start` on."""
    begin = time.perf_counter()
    settings = DataSettings(train=(SourceSettings(path=directory),), image_size=28, augment="none")
    loader = train_loader(
        open_data(settings, ["digit"]),
        seed=1,
        global_batch=BATCH,
        accumulation=1,
        rank=0,
        world_size=1,
        start_position=start,
        end_position=length,
        workers=workers,
        pin_memory=False,
    )
    batch = next(iter(loader))
    elapsed = time.perf_counter() - begin
    assert batch.positions_B[0] == start and batch.valid_B.all()
    return elapsed


def write_sparse_dataset(directory: Path, num_samples: int) -> int:
    """Write the dataset; its number of samples, a multiple of a shard's."""
    image = io.BytesIO()
    np.save(image, np.arange(784, dtype=np.uint8).reshape(28, 28))
    num_shards = max(1, num_samples // SHARD_SAMPLES)
    with ShardWriter(directory, "train", {"digit": "classification"}) as writer:
        writer.write("sample", image.getvalue(), "npy", {"digit": 1}, {})
    (written,) = writer.shards
    content = (directory / written.path).read_bytes()
    shards = []
    for number in range(num_shards):
        path = directory / f"train-{number:06d}.tar"
        with open(path, "wb") as file:
            file.write(content)
            file.truncate(SHARD_SAMPLES * SAMPLE_BYTES)
        shards.append(ShardInfo(path.name, SHARD_SAMPLES, SHARD_SAMPLES * SAMPLE_BYTES, "0" * 64))
    length = num_shards * SHARD_SAMPLES
    row = np.load(index_path(directory, "train"))
    save_index(index_path(directory, "train"), np.repeat(row, length))
    info = TaskInfo("classification", ("a", "b"), num_labelled=length, class_counts=(0, length))
    labels = {"digit": LabelCounts(length, 0, (0, length))}
    splits = {"train": SplitInfo(length, tuple(shards), labels)}
    write_manifest(directory, Manifest(1, "uint8", {"digit": info}, splits))
    return length
