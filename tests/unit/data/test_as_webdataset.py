"""A dataset as a pipeline of webdataset: the same samples, images and labels as our reader's."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

import mtl_dist
from mtl_dist.data.decode import decode_image, decode_map
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.errors import UserError
from tests.tiny_datasets import TASKS, write_dataset


def test_other_peoples_loops_see_the_samples_and_labels_that_ours_sees(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 12, "val": 3})
    manifest = read_manifest(tmp_path / "tiny")
    for split in manifest.splits:
        reader = SplitReader(tmp_path / "tiny", manifest, split)
        samples = list(mtl_dist.webdataset(tmp_path / "tiny", split))
        assert len(samples) == reader.num_samples
        for row, sample in enumerate(samples):
            has = [task for task in TASKS if reader.labelled(task, np.array([row]))[0]]
            ours = reader.read(row, tuple(task for task in has if task == "shape"))
            assert sample["__key__"] == ours.key
            assert sample["image"].equal(decode_image(bytes(ours.image), manifest.channels))
            for task in TASKS:
                if task not in has:
                    assert sample[task] is None
                elif task == "shape":
                    assert (sample[task] == decode_map(ours.masks[task])).all()
                else:
                    assert sample[task] == ours.labels[task]


def test_it_is_a_pipeline_like_any_other_and_hands_out_files_on_request(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 10})
    pipeline = mtl_dist.webdataset(str(tmp_path / "tiny"), decode=False, shardshuffle=2, seed=1)
    tuples = pipeline.shuffle(5).to_tuple("image", "digit", none_is_error=False)
    image, digit = next(iter(tuples))
    assert isinstance(image, bytes) and digit in (None, 0, 1, 2)


def test_a_pipeline_refuses_what_it_cannot_hand_out(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 5})
    with pytest.raises(UserError, match="expected a split 'test', found none"):
        mtl_dist.webdataset(tmp_path / "tiny", "test")
    (shard,) = (tmp_path / "tiny").glob("*.tar")
    with tarfile.open(shard, "w") as tar:
        for name, data in {"a.png": b"no image", "a.json": b"{}"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"sample a: .*Prepare the dataset again"):
        list(mtl_dist.webdataset(tmp_path / "tiny"))
