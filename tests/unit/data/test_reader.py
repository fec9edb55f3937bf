"""Reading samples by row: what plain webdataset reads, and clear lines for what is broken."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset

import mtl_dist.data.reader as reader_module
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.reader import SplitReader, UnreadableSample
from mtl_dist.errors import UserError
from tests.tiny_datasets import TASKS, encoded, labels_of, masks_of, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", {"train": 23, "val": 4}, shard_samples=5)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "tiny", {"train": 12}, shard_samples=5)


def opened(directory: Path, split: str = "train") -> SplitReader:
    return SplitReader(directory, read_manifest(directory), split)


def test_every_row_holds_what_was_written(dataset: Path) -> None:
    reader = opened(dataset)
    assert reader.num_samples == 23
    assert reader.shard_sizes == (5, 5, 5, 5, 3)
    for row in range(23):
        masks = masks_of(row)
        sample = reader.read(row, tuple(masks))
        assert sample.key == f"sample{row:05d}"
        assert sample.image == encoded(row)
        assert sample.labels == labels_of(row)
        assert sample.masks == masks
        assert sample.key in reader.where(row)


def test_plain_webdataset_reads_the_same_keys_bytes_and_labels(dataset: Path) -> None:
    shards = [str(dataset / shard.path) for shard in read_manifest(dataset).splits["train"].shards]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    reader = opened(dataset)
    assert len(theirs) == reader.num_samples
    for row, sample in enumerate(theirs):
        masks = ("shape",) if "shape.png" in sample else ()
        ours = reader.read(row, masks)
        assert sample["__key__"] == ours.key
        assert sample["npy"] == ours.image
        assert json.loads(sample["json"]) == ours.labels
        assert {task: sample[f"{task}.png"] for task in masks} == ours.masks


def test_the_index_says_which_rows_are_labelled(dataset: Path) -> None:
    reader = opened(dataset)
    rows = np.arange(23)
    for task in TASKS:
        has = [task in labels_of(row) or task in masks_of(row) for row in range(23)]
        assert reader.labelled(task, rows).tolist() == has
    assert not reader.labelled("of another dataset", rows).any()


def test_members_far_apart_are_read_one_by_one(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_GAP", 0)
    for row in (1, 22):
        sample = opened(dataset).read(row, ("shape",))
        assert (sample.key, sample.image, sample.masks) == (f"sample{row:05d}", encoded(row), masks_of(row))


def test_few_files_are_open_at_once_and_every_row_is_still_read(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN", 2)
    reader = opened(dataset)
    for row in [*range(23), *reversed(range(23))]:
        assert reader.read(row).key == f"sample{row:05d}"
        assert len(reader._files) <= 2
    reader.close()
    assert reader.read(3).key == "sample00003"


def test_a_reader_goes_on_in_another_process(dataset: Path) -> None:
    reader = opened(dataset)
    reader.read(0)
    other = pickle.loads(pickle.dumps(reader))
    assert other.read(7) == reader.read(7)


def test_a_forked_child_reads_with_the_files_its_parent_opened(dataset: Path) -> None:
    reader = opened(dataset)
    reader.read(0)
    child = os.fork()
    if child == 0:
        ok = all(reader.read(row).key == f"sample{row:05d}" for row in range(5)) and not reader.close()
        os._exit(0 if ok else 1)
    keys = [reader.read(row).key for row in range(5)]
    assert os.waitpid(child, 0)[1] == 0
    assert keys == [f"sample{row:05d}" for row in range(5)]


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "train-000001.tar").unlink()
    with pytest.raises(
        UserError, match=r"train-000001\.tar: expected a shard of [\d,]+ bytes, found no such"
    ):
        opened(copy)


def test_a_truncated_shard_is_named_with_its_size(copy: Path) -> None:
    path = copy / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    with pytest.raises(UserError, match=f"expected a shard of {size:,} bytes, found {size - 1000:,}"):
        opened(copy)


def test_a_missing_index_is_named(copy: Path) -> None:
    (copy / "train.index.npy").unlink()
    with pytest.raises(UserError, match=r"train\.index\.npy: expected the index .* found no such file"):
        opened(copy)


def test_an_index_of_another_length_is_refused(copy: Path) -> None:
    path = copy / "train.index.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(UserError, match=r"expected 12 rows .* found 11"):
        opened(copy)


def test_an_index_of_other_tasks_is_refused(copy: Path) -> None:
    path = copy / "train.index.npy"
    np.save(path, np.zeros(12, dtype=[("image_offset", "<u8")]))
    with pytest.raises(UserError, match=r"rows of the tasks in dataset\.json"):
        opened(copy)


def test_an_index_that_is_no_index_is_refused(copy: Path) -> None:
    (copy / "train.index.npy").write_bytes(b"not an array")
    with pytest.raises(UserError, match=r"train\.index\.npy: expected an index, found"):
        opened(copy)


def test_labels_that_are_no_object_are_reported(copy: Path) -> None:
    reader = opened(copy)
    row = np.load(copy / "train.index.npy")[2]
    with open(copy / "train-000000.tar", "r+b") as tar:
        tar.seek(int(row["json_offset"]))
        tar.write(b"[" + b" " * (int(row["json_size"]) - 2) + b"]")
    with pytest.raises(UnreadableSample, match="not a JSON object"):
        reader.read(2)


def test_a_mask_that_the_index_promises_and_lacks_is_reported(copy: Path) -> None:
    with pytest.raises(UnreadableSample, match="no mask shape"):
        opened(copy).read(7, ("shape",))


def test_a_shard_that_shrinks_under_the_reader_is_reported(copy: Path) -> None:
    reader = opened(copy)
    os.truncate(copy / "train-000002.tar", 600)
    with pytest.raises(UnreadableSample, match=r"ends .* bytes too early"):
        reader.read(11)
    assert "row 11" in reader.where(11) or "sample00011" in reader.where(11)
