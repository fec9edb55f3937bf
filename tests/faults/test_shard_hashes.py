"""Shards, tables and counts that are not what was prepared: found at the start, or while it trains."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_dist.assemble import identified
from mtl_dist.data import shard_check
from mtl_dist.data.loader import open_data
from mtl_dist.data.manifest import read_manifest, write_manifest
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.shard_check import LocalShard, ShardCheck
from mtl_dist.errors import UserError
from tests.tiny_datasets import write_dataset
from tests.tiny_runs import train_run, write_recipe


def flip(path: Path, at: int = -2000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LocalShard]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = write_dataset(tmp_path / "tiny", {"train": 20})
    found = read_manifest(directory).splits["train"].shards
    return [LocalShard(directory / shard.path, shard.num_bytes, shard.sha256) for shard in found]


def checked(shards: list[LocalShard], *, ends: bool = True, begin_at: float = 0.0) -> tuple[str, list[str]]:
    """The line that the check ends with, and what it says."""
    said: list[str] = []
    with ShardCheck(shards, begin_at, said.append, ends=ends) as check:
        try:
            check.finish()
        except UserError as error:
            (line,) = str(error).splitlines()
            return line, said
    return "", said


@pytest.mark.parametrize("begin_at", [0.0, 0.5])
def test_a_shard_with_one_flipped_bit_is_one_line_with_its_name(
    shards: list[LocalShard], begin_at: float
) -> None:
    assert checked(shards, begin_at=begin_at) == ("", [])
    flip(shards[1].path)
    line, _ = checked(shards, begin_at=begin_at)
    assert line.startswith(f"{shards[1].path}: expected the content that was prepared (SHA-256 ")
    line, (warning,) = checked(shards, ends=False)
    assert line == "" and warning.startswith(f"warning  {shards[1].path}: ")


def test_what_was_found_good_is_not_read_again_until_the_file_is_another(
    shards: list[LocalShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    hash_of = ShardCheck.hash_of

    def hashed(check: ShardCheck, descriptor: int) -> str | None:
        read.append(descriptor)
        return hash_of(check, descriptor)

    monkeypatch.setattr(ShardCheck, "hash_of", hashed)
    assert checked(shards) == ("", []) and len(read) == 4
    assert checked(shards) == ("", []) and len(read) == 4
    os.utime(shards[2].path)
    assert checked(shards) == ("", []) and len(read) == 5
    record = shard_check.record_of(shards[0].path)
    flip(record, 3)
    record.write_bytes(record.read_bytes() + b"\xff\nx y\n")
    assert checked(shards) == ("", []) and len(read) == 9


def test_without_a_place_to_remember_and_with_shards_that_are_gone_it_goes_on(
    shards: list[LocalShard], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    shards[0].path.unlink()  # who reads it says so
    assert checked(shards) == ("", [])


def test_what_was_not_reached_is_said(shards: list[LocalShard], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_check, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(ShardCheck, "problem_of", lambda check, shard: check._over.wait(60) and "")
    line, (told,) = checked(shards)
    assert line == "" and told.startswith("shards   4 of 4 were not yet compared") and "--verify" in told


def test_a_run_over_a_damaged_shard_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = write_dataset(tmp_path / "tiny", {"train": 30, "val": 9})
    recipe = write_recipe(tmp_path, directory)
    flip(directory / "val-000001.tar")
    with pytest.raises(UserError) as refusal:
        train_run(recipe, tmp_path / "run", ["train.epochs=1"])
    assert str(refusal.value).startswith(f"{directory / 'val-000001.tar'}: expected the content")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and not status["retry"] and "val-000001.tar" in status["reason"]


# ---------------------------------------------------------------- tables and counts
def roll(path: Path) -> None:
    np.save(path, np.roll(np.load(path), 1))


def shift_within_a_shard(path: Path) -> None:
    rows = np.load(path)
    rows[:5] = np.roll(rows[:5], 1)
    np.save(path, rows)


def relabel(path: Path) -> None:
    rows = np.load(path)
    rows["digit"] = np.roll(rows["digit"], 1)
    np.save(path, rows)


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "dataset.json"
    manifest = json.loads(path.read_text())
    change(manifest["splits"]["train"])
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset with all its tables."""
    from mtl_dist import prepare

    folder = tmp_path_factory.mktemp("digits")
    prepare.digits(folder / "digits")
    return folder / "digits"


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "digits"))


def start(directory: Path) -> str:
    """The line that a start over the data ends with, or none."""
    manifest = read_manifest(directory)
    settings = DataSettings.model_validate(
        {"train": [{"path": str(directory)}], "image_size": 8}, strict=False
    )
    try:
        identified(open_data(settings, list(manifest.tasks)))
    except UserError as error:
        (line,) = str(error).splitlines()
        return line
    return ""


@pytest.mark.parametrize(
    ("table", "damage", "words"),
    [
        ("index", roll, "expected the offset index that dataset.json was written with"),
        ("index", shift_within_a_shard, "expected the offset index"),
        ("labels", relabel, "expected the label columns"),
        ("hashes", roll, "expected the content hashes"),
        ("labels", Path.unlink, "expected the label columns that dataset.json was written with"),
    ],
)
def test_a_table_that_is_not_the_one_prepared_is_named(
    copy: Path, table: str, damage: Callable[[Path], None], words: str
) -> None:
    assert start(copy) == ""
    path = copy / f"train.{table}.npy"
    damage(path)
    line = start(copy)
    assert line.startswith(f"{path}: {words}")


def test_counts_that_the_tables_do_not_have_are_named(copy: Path) -> None:
    def fewer(split: dict[str, Any]) -> None:
        labels = split["labels"]["digit"]
        labels["present"], labels["missing"] = labels["present"] - 1, labels["missing"] + 1

    def other(split: dict[str, Any]) -> None:
        counts = split["labels"]["digit"]["class_counts"]
        counts[0], counts[1] = counts[0] + 1, counts[1] - 1

    for change, words in ((fewer, "samples with a label of digit"), (other, "labels of each class of digit")):
        before = (copy / "dataset.json").read_bytes()
        edit(copy, change)
        assert f"dataset.json: expected the {words} in train that are there" in start(copy)
        (copy / "dataset.json").write_bytes(before)


def test_labels_rewritten_within_a_shard_with_the_same_length_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = write_dataset(tmp_path / "tiny", {"train": 30, "val": 9}, 10)
    path = directory / "train-000000.tar"
    content = path.read_bytes()
    assert b'"digit":1' in content
    path.write_bytes(content.replace(b'"digit":1', b'"digit":2', 1))
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as whole:  # nothing else is wrong with it
        assert len(whole.getnames()) > 20
    with pytest.raises(UserError, match=r"train-000000\.tar: expected the content that was prepared"):
        train_run(write_recipe(tmp_path, directory), tmp_path / "run", ["train.epochs=1"])


def test_a_manifest_without_hashes_of_tables_is_read(copy: Path) -> None:
    edit(copy, lambda split: split.pop("tables"))
    assert start(copy) == ""
    write_manifest(copy, read_manifest(copy))
    assert set(read_manifest(copy).splits["train"].tables) == {"index", "labels", "hashes"}
