"""Leakage: images that splits have in common are found, within a dataset and over those of a mix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_dist.data.content_hashes import HASH_DTYPE, content_hash, content_hashes_path, same_rows
from mtl_dist.data.leakage import leakage
from mtl_dist.data.loader import open_data
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.packing import pack
from tests.tiny_datasets import image_of, png, write_dataset

HASHES = st.lists(st.integers(0, 40), max_size=30).map(lambda values: np.array(values, HASH_DTYPE))


def write(directory: Path, task: str, splits: Mapping[str, Sequence[int]]) -> Path:
    """A dataset of one task whose images are those of these numbers."""
    records = {
        split: [Record(f"{split}{number}", png(image_of(number)), {task: number % 2}) for number in numbers]
        for split, numbers in splits.items()
    }
    pack(
        records,
        directory,
        {task: TaskSource("classification", ("a", "b"))},
        directory.name,
        options=PackOptions(workers=1, shard_samples=3),
    )
    return directory


def lines(root: Path, tasks: Sequence[str], **sources: Any) -> list[str]:
    settings = DataSettings.model_validate({"image_size": 8, **sources}, strict=False)
    return list(leakage(open_data(settings, tasks, root)))


@given(HASHES, HASHES)
def test_each_row_that_the_other_column_holds_is_found_with_the_first_row_there(
    few: np.ndarray, many: np.ndarray
) -> None:
    in_few, in_many = same_rows(few, many)
    assert in_few.tolist() == [row for row, value in enumerate(few) if value in many]
    assert in_many.tolist() == [many.tolist().index(value) for value in few[in_few].tolist()]


def test_a_prepared_dataset_keeps_the_content_hash_of_every_image(tmp_path: Path) -> None:
    write(tmp_path / "cats", "breed", {"train": range(8)})
    reader = SplitReader(tmp_path / "cats", read_manifest(tmp_path / "cats"), "train")
    hashes = reader.content_hashes()
    assert hashes is not None
    for row in range(8):
        assert hashes[row].tobytes() == content_hash(bytes(reader.read(row).image))


def test_an_image_of_one_datasets_training_in_anothers_validation_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cats", "breed", {"train": range(8), "val": [20, 21]})
    write(tmp_path / "moods", "mood", {"train": [30, 20, 31], "val": [5, 32], "test": [33, 31]})
    mix = [{"path": "cats"}, {"path": "moods"}]
    assert lines(tmp_path, ["breed", "mood"], train=mix) == [
        "the same image in train of cats and val of moods: 1 (train5 = val5).",
        "the same image in train of moods and val of cats: 1 (train20 = val20).",
        "the same image in train of moods and test of moods: 1 (train31 = test31).",
    ]
    assert lines(tmp_path, ["breed"], train=mix) == []


def test_many_shared_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    write(tmp_path / "cats", "breed", {"train": range(8), "val": range(8)})
    (line,) = lines(tmp_path, ["breed"], train=[{"path": "cats"}])
    assert line.startswith("the same image in train of cats and val of cats: 8 (")
    assert line.endswith(" and 5 more).")
    assert line.count(" = ") == 3


def test_of_a_dataset_without_content_hashes_it_is_said_that_nothing_is_known(tmp_path: Path) -> None:
    write(tmp_path / "cats", "breed", {"train": range(4), "val": [3]})
    write_dataset(tmp_path / "old", {"train": 6, "val": 3})
    assert not read_manifest(tmp_path / "old").content_hashes
    known, unknown = lines(tmp_path, ["breed", "tags"], train=[{"path": "cats"}, {"path": "old"}])
    assert known.startswith("the same image in train of cats and val of cats: 1 ")
    assert unknown.startswith(
        "whether splits have images in common is not known of train of old, val of old: "
    )


def test_content_hashes_of_a_dataset_of_format_version_1_are_read(tmp_path: Path) -> None:
    write(tmp_path / "cats", "breed", {"train": range(4), "val": [3]})
    for split in ("train", "val"):
        (tmp_path / f"cats/{split}.hashes.npy").rename(tmp_path / f"cats/{split}.digests.npy")
    manifest = json.loads((tmp_path / "cats/dataset.json").read_text())
    del manifest["content_hashes"]
    manifest |= {"version": 1, "digests": True}
    (tmp_path / "cats/dataset.json").write_text(json.dumps(manifest))
    (line,) = lines(tmp_path, ["breed"], train=[{"path": "cats"}])
    assert line.startswith("the same image in train of cats and val of cats: 1 ")


def test_content_hashes_that_are_promised_and_missing_are_one_line(tmp_path: Path) -> None:
    write(tmp_path / "cats", "breed", {"train": range(4), "val": [9]})
    content_hashes_path(tmp_path / "cats", "val").unlink()
    with pytest.raises(UserError, match=r"val\.hashes\.npy: expected .*, found no such file"):
        lines(tmp_path, ["breed"], train=[{"path": "cats"}])


def test_a_test_split_that_is_the_val_split_on_purpose_is_named_and_no_leak(tmp_path: Path) -> None:
    write(tmp_path / "one", "a", {"train": range(6), "val": range(10, 14)})
    same = [{"path": "one", "split": "val"}]
    settings = {"image_size": 8, "train": [{"path": "one"}], "val": same, "test": same}
    data = open_data(DataSettings.model_validate(settings, strict=False), ["a"], tmp_path)
    assert list(leakage(data)) == []
    assert data.describe() == "train 6; val 4; test 4 (the same as val)"
    write(tmp_path / "other", "a", {"test": range(12, 16)})
    other = [{"path": "other", "split": "test"}]
    assert lines(tmp_path, ["a"], train=[{"path": "one"}], val=same, test=other) == [
        "the same image in val of one and test of other: 2 (val12 = test12; val13 = test13)."
    ]
