"""Shards: deterministic tars that plain WebDataset reads, and an index that fits them."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mtl_dist.data.shards import (
    ShardWriter,
    check_task_names,
    index_dtype,
    index_path,
    read_key,
    read_name,
    scan_shard,
)
from mtl_dist.durable import sha256_of
from mtl_dist.errors import UserError

TASKS: dict[str, str] = {
    "breed": "classification",
    "lesion": "segmentation",
    "age": "regression",
    "Zones": "segmentation",
}


def samples(count: int = 25) -> list[tuple[str, bytes, str, dict, dict]]:
    """Samples of every combination of labels, with sizes around a tar block's 512 bytes."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        labels = {name: value for name, value in (("breed", number), ("age", 0.5)) if draw.random() < 0.6}
        masks = {name: draw.randbytes(draw.choice([1, 511, 512, 513])) for name in ("lesion", "Zones")}
        masks = {name: mask for name, mask in masks.items() if draw.random() < 0.6}
        image = draw.randbytes(draw.choice([1, 511, 512, 513, 2000]))
        made.append((f"key-{number}", image, "jpg" if number % 2 else "npy", labels, masks))
    return made


def written(directory: Path, **limits: int) -> ShardWriter:
    directory.mkdir()
    with ShardWriter(directory, "train", TASKS, **limits) as writer:
        for sample in samples():
            writer.write(*sample)
    return writer


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", max_samples=10), written(tmp_path / "b", max_samples=10)
    assert first.shards == second.shards
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_shards_are_closed_by_samples_or_by_bytes(tmp_path: Path) -> None:
    by_samples = written(tmp_path / "a", max_samples=10).shards
    assert [shard.num_samples for shard in by_samples] == [10, 10, 5]
    by_bytes = written(tmp_path / "b", max_bytes=8192).shards
    assert sum(shard.num_samples for shard in by_bytes) == 25
    largest = 8192 + 7 * 1024 + 10240  # one sample more, and the padding at a tar's end
    assert len(by_bytes) > 3 and all(shard.num_bytes <= largest for shard in by_bytes)


def test_the_manifest_line_of_a_shard_is_true(tmp_path: Path) -> None:
    for shard in written(tmp_path / "a", max_samples=10).shards:
        path = tmp_path / "a" / shard.path
        assert path.stat().st_size == shard.num_bytes
        assert sha256_of(path) == shard.sha256


def test_the_index_leads_to_every_byte(tmp_path: Path) -> None:
    writer = written(tmp_path / "a", max_samples=10)
    index = np.load(index_path(tmp_path / "a", "train"), mmap_mode="r")
    assert index.dtype == index_dtype(["lesion", "Zones"])
    tars = [(tmp_path / "a" / shard.path).read_bytes() for shard in writer.shards]
    for row, (key, image, extension, labels, masks) in zip(index, samples(), strict=True):
        tar = tars[int(key.split("-")[1]) // 10]

        def member(field: str, tar: bytes = tar, row: np.void = row) -> bytes:
            return tar[row[f"{field}_offset"] : row[f"{field}_offset"] + row[f"{field}_size"]]

        assert member("image") == image
        assert json.loads(member("json")) == labels
        assert {task: member(task) for task in ("lesion", "Zones") if row[f"{task}_size"]} == masks
        labelled = [task for bit, task in enumerate(TASKS) if int(row["labelled"]) >> bit & 1]
        assert labelled == [task for task in TASKS if task in labels or task in masks]
        assert read_key(tar, int(row["image_offset"])) == key
        assert read_name(tar, int(row["image_offset"])) == f"{key}.{extension}"


def test_a_name_can_be_read_from_the_file_too(tmp_path: Path) -> None:
    writer = written(tmp_path / "a")
    offset = int(np.load(index_path(tmp_path / "a", "train"))["json_offset"][7])
    assert read_name(tmp_path / "a" / writer.shards[0].path, offset) == "key-7.json"


def test_the_index_can_be_rebuilt_from_the_tars_alone(tmp_path: Path) -> None:
    writer = written(tmp_path / "a", max_samples=10)
    rebuilt = [scan_shard(tmp_path / "a" / shard.path, TASKS) for shard in writer.shards]
    np.testing.assert_array_equal(np.concatenate(rebuilt), np.load(index_path(tmp_path / "a", "train")))


def test_plain_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    writer = written(tmp_path / "a", max_samples=10)
    urls = [str(tmp_path / "a" / shard.path) for shard in writer.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == 25
    for found, (key, image, extension, labels, masks) in zip(read, samples(), strict=True):
        assert found["__key__"] == key
        assert found[extension] == image
        assert json.loads(found["json"]) == labels
        for task, mask in masks.items():
            assert found[f"{task.lower()}.png"] == mask  # webdataset lowers the case of extensions


def test_a_shard_is_what_the_writer_of_webdataset_makes_byte_for_byte(tmp_path: Path) -> None:
    written(tmp_path / "a")
    with webdataset.TarWriter(
        str(tmp_path / "its.tar"), encoder=False, mtime=0, user="mtl", group="mtl"
    ) as writer:
        for key, image, extension, labels, masks in samples():
            text = json.dumps(labels, separators=(",", ":"), sort_keys=True).encode()
            members = {f"{task}.png": mask for task, mask in masks.items()}
            writer.write({"__key__": key, extension: image, "json": text, **members})
    assert (tmp_path / "a" / "train-000000.tar").read_bytes() == (tmp_path / "its.tar").read_bytes()


def test_an_exception_leaves_neither_an_open_shard_nor_an_index(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path, "train", TASKS, max_samples=2) as writer:
        for sample in samples(3):
            writer.write(*sample)
        raise KeyError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            source = path.with_suffix(".part")
            source.write_bytes(data)
            tar.add(source, name)
    return path


IMAGE, LABELS = ("a.jpg", b"x"), ("a.json", b"{}")


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([IMAGE], "no image or no labels"),
        ([LABELS], "no image or no labels"),
        ([IMAGE, LABELS, ("a.other.png", b"x")], "'a.other.png', which is no image"),
        ([IMAGE, ("a.png", b"x"), LABELS], "two members for 'image'"),
        ([IMAGE, ("a.json", b'{"depth": 1}')], "unknown task 'depth'"),
        ([IMAGE, ("a.json", b"[")], "no JSON object in 'a.json'"),
    ],
)
def test_a_tar_that_is_no_shard_of_the_dataset_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], found: str
) -> None:
    with pytest.raises(UserError, match=found):
        scan_shard(tar_of(tmp_path / "x.tar", *members), TASKS)


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    writer = written(tmp_path / "a")
    path = tmp_path / "a" / writer.shards[0].path
    for keep in (0, 700, 20_000):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match="expected a shard"):
            scan_shard(path, TASKS)


@pytest.mark.parametrize("name", ["", "2d", "a.b", "a b", "image", "json", "é", "_hidden", "x" * 31])
def test_a_task_name_that_a_shard_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected a name"):
        check_task_names({name: "classification"})


def test_two_task_names_may_not_differ_in_case_only() -> None:
    with pytest.raises(UserError, match="differ only in case"):
        check_task_names({"Age": "regression", "age": "regression"})


def test_there_are_at_most_64_tasks() -> None:
    check_task_names({f"t{i}": "regression" for i in range(64)})
    with pytest.raises(UserError, match="at most 64, found 65"):
        check_task_names({f"t{i}": "regression" for i in range(65)})
