"""Checkpoints are whole or absent, and a damaged one is never read."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mtl_dist import checkpoint as ckpt
from mtl_dist.assemble import chosen_checkpoint
from mtl_dist.checkpoint import Best, Checkpoint, CheckpointWriter
from mtl_dist.errors import UserError
from mtl_dist.run_folder import RunFolder


def make(step: int, fill: float = 1.0) -> Checkpoint:
    tensors = {
        "model": {"weight": torch.full((3, 4), fill), "counter": torch.tensor(step)},
        "optimizer": {"exp_avg/weight": torch.randn(3, 4)},
    }
    return Checkpoint(step, tensors, {"step": step, "position": step * 8}, "tasks: {}\n", "{}", "{}\n")


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    written = make(12)
    path = ckpt.write_checkpoint(tmp_path, written)
    read = ckpt.read_checkpoint(path)
    assert path.name == "step_00000012"
    assert (read.step, read.state, read.recipe) == (12, written.state, written.recipe)
    assert (read.data, read.record) == (written.data, written.record)
    for name, tensors in written.tensors.items():
        assert read.tensors[name].keys() == tensors.keys()
        assert all(torch.equal(read.tensors[name][key], tensors[key]) for key in tensors)


def test_one_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = ckpt.write_checkpoint(tmp_path, make(1))
    for file in sorted(path.iterdir()):
        if file.name == ckpt.MANIFEST:
            continue
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        (problem,) = ckpt.problems_of(path)
        assert file.name in problem and "damaged" in problem
        with pytest.raises(UserError, match="damaged"):
            ckpt.read_checkpoint(path)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert ckpt.problems_of(path) == []


def test_a_missing_a_short_and_an_unfinished_file_are_found(tmp_path: Path) -> None:
    path = ckpt.write_checkpoint(tmp_path, make(1))
    with open(path / "optimizer.safetensors", "r+b") as file:
        file.truncate(10)
    (path / "state.json").unlink()
    assert len(ckpt.problems_of(path)) == 2
    (path / ckpt.MANIFEST).unlink()
    assert "not complete" in ckpt.problems_of(path)[0]


def test_the_newest_good_one_is_taken_and_the_damaged_one_named(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        ckpt.write_checkpoint(tmp_path, make(step))
    (tmp_path / "step_00000030" / "model.safetensors").write_bytes(b"torn")
    said: list[str] = []
    newest = ckpt.newest_good(tmp_path, said.append)
    assert newest is not None and newest.name == "step_00000020"
    assert any("step_00000030" in line for line in said)


def test_a_damaged_checkpoint_is_replaced_by_the_same_step(tmp_path: Path) -> None:
    path = ckpt.write_checkpoint(tmp_path, make(5))
    (path / "model.safetensors").write_bytes(b"torn")
    ckpt.write_checkpoint(tmp_path, make(5, fill=2.0))
    assert ckpt.problems_of(path) == []
    assert float(ckpt.read_checkpoint(path).tensors["model"]["weight"][0, 0]) == 2.0


def test_a_write_that_fails_leaves_no_checkpoint_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt.write_checkpoint(tmp_path, make(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.submit(make(2))
    with pytest.raises(UserError, match="No space left"):
        writer.finish()
    monkeypatch.undo()
    assert ckpt.steps_in(tmp_path) == [1]
    assert ckpt.newest_good(tmp_path, print) == tmp_path / "step_00000001"


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=2)
    for step in range(1, 7):
        writer.submit(make(step), best=Best(2, "val/loss", 0.5) if step >= 2 else None)
    writer.finish()
    assert ckpt.steps_in(tmp_path) == [2, 5, 6]
    assert ckpt.best_checkpoint(tmp_path, print) == tmp_path / "step_00000002"
    assert json.loads((tmp_path / "best.json").read_text())["metric"] == "val/loss"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_best_of_each_task_is_kept_where_the_run_follows_them(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1)
    bests = {"digit": {"step": 2, "metric": "val/digit/accuracy", "value": 0.9}}
    for step in range(1, 6):
        checkpoint = make(step)
        checkpoint.state["monitor"] = {"task_bests": bests if step >= 2 else {}}
        writer.submit(checkpoint)
    writer.finish()
    assert ckpt.steps_in(tmp_path) == [2, 5]
    folder = RunFolder(tmp_path)
    folder.checkpoints = tmp_path
    assert chosen_checkpoint(folder, "best/digit", print) == tmp_path / "step_00000002"
    with pytest.raises(UserError, match=r"expected a task whose best is kept \(digit\), found 'best/age'"):
        chosen_checkpoint(folder, "best/age", print)


def test_that_no_evaluation_has_chosen_the_weights_is_said(tmp_path: Path) -> None:
    """As of a run that was stopped before its first evaluation, or has no val."""
    said: list[str] = []
    folder = RunFolder(tmp_path)
    folder.checkpoints = tmp_path
    for step, best in ((1, None), (2, Best(2, "val/loss", 0.5))):
        writer = CheckpointWriter(tmp_path, keep_last=2)
        writer.submit(make(step), best=best)
        writer.finish()
        assert chosen_checkpoint(folder, "best", said.append) == tmp_path / f"step_0000000{step}"
    assert said == [
        f"{tmp_path}: no evaluation has chosen the best weights yet; step_00000001, the newest, is used."
    ]


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = ckpt.write_checkpoint(tmp_path, make(1))
    manifest = json.loads((path / ckpt.MANIFEST).read_text())
    manifest["version"] = ckpt.FORMAT_VERSION + 1
    (path / ckpt.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="Upgrade"):
        ckpt.read_checkpoint(path)
