"""Data that is shortened, replaced or deleted while it is read: one line or the old bytes, no bus error."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtl_dist.data import batch_loader, shards, split_tables
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from tests.tiny_datasets import HEIGHT, TASKS, WIDTH, encoded, image_of, png, write_dataset

SCALARS = {name: TASKS[name] for name in ("digit", "value")}
NUM = 200


def shorten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 3)


def empty(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(0)


def replace_by_shorter(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 3])


def as_png(number: int) -> bytes:
    return png(image_of(number))


def read_while(
    damage: Callable[[Path], None], dataset: Path, pattern: str, workers: int, small: bool = True
) -> str:
    """Two epochs of batches, the files damaged after the first batch; the line that it ends with, or none."""
    size = [HEIGHT, WIDTH] if small else [2 * HEIGHT, WIDTH]
    stated = {"train": [{"path": str(dataset)}], "image_size": size, "augment": "none"}
    data = open_data(DataSettings.model_validate(stated, strict=False), SCALARS)
    batches = train_loader(
        data,
        seed=3,
        global_batch=8,
        accumulation=1,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=2 * data.num_train_samples,
        workers=workers,
        pin_memory=False,
    )
    seen = 0
    try:
        for batch in batches:
            if seen == 0:
                for path in dataset.glob(pattern):
                    damage(path)
            seen += len(batch.keys)
    except UserError as error:
        (line,) = str(error).splitlines()
        return line
    assert seen == 2 * NUM
    return ""


@pytest.mark.parametrize(
    ("encode", "extension", "small", "workers"),
    [
        (encoded, "npy", True, 0),
        (as_png, "png", True, 0),
        (encoded, "npy", True, 1),
        (as_png, "png", False, 0),
    ],
)
@pytest.mark.parametrize("damage", [shorten, empty, replace_by_shorter, Path.unlink])
def test_a_shard_that_is_shortened_while_it_is_read_is_one_line_with_its_name(
    tmp_path: Path,
    damage: Callable[[Path], None],
    encode: Callable[[int], bytes],
    extension: str,
    small: bool,
    workers: int,
) -> None:
    dataset = write_dataset(tmp_path / "tiny", {"train": NUM}, 40, encode, extension, SCALARS)
    line = read_while(damage, dataset, "train-*.tar", workers, small)
    if damage in (shorten, empty):
        assert "bytes too early" in line
    if line:  # shards that were open before they were replaced or deleted are still whole
        assert line.startswith(str(dataset / "train-0")) and line.endswith(
            "`data.on_bad_sample: {kind: skip}`."
        )


@pytest.mark.parametrize("max_copied", [0, 1 << 26])
def test_an_index_that_is_shortened_while_it_is_read_is_one_line_or_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_copied: int
) -> None:
    monkeypatch.setattr(split_tables, "MAX_COPIED", max_copied)
    dataset = write_dataset(tmp_path / "tiny", {"train": NUM}, 40, tasks=SCALARS)
    line = read_while(empty, dataset, "train.index.npy", workers=0)
    assert ("train.index.npy: expected" in line and "shortened" in line) if max_copied == 0 else line == ""


def test_a_shard_that_is_shortened_while_it_is_scanned_is_one_line(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "tiny", {"train": NUM}, NUM, tasks=SCALARS)
    (path,) = dataset.glob("train-*.tar")
    with open(path, "rb") as file:
        members = shards.members_of(path, file.fileno())
        next(members)
        shorten(path)
        with pytest.raises(UserError, match="its end missing"):
            list(members)


def test_workers_that_are_ended_with_their_run_are_no_failure() -> None:
    def failed(number: int, frame: object) -> None:
        raise RuntimeError("a worker failed")

    before = signal.signal(signal.SIGCHLD, failed)
    try:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        batch_loader.end_workers()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGCHLD, before)
