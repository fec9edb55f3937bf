"""Checkpoints through kills and damage: the best one stays known, a good one is never given up for a bad."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from mtl_dist import checkpoint as ckpt
from mtl_dist.checkpoint import Best, CheckpointWriter
from mtl_dist.errors import UserError
from tests.tiny_runs import train_run
from tests.unit.test_checkpoint import make


def damage(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def test_the_best_is_known_after_a_kill_between_its_rename_and_best_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.submit(make(1), Best(1, "val/loss", 0.9))
    writer.finish()

    def killed(directory: Path, best: Best) -> None:
        raise SystemExit

    monkeypatch.setattr(ckpt, "write_best", killed)
    writer.submit(make(2), Best(2, "val/loss", 0.5))
    with pytest.raises(SystemExit):
        writer.finish()
    monkeypatch.undo()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1
    assert ckpt.known_bests(tmp_path)[0] == Best(2, "val/loss", 0.5)

    after = CheckpointWriter(tmp_path, keep_last=1)
    for step in (3, 4):
        after.submit(make(step), Best(2, "val/loss", 0.5))
    after.finish()
    assert ckpt.steps_in(tmp_path) == [2, 4]
    assert ckpt.best_checkpoint(tmp_path, print) == tmp_path / "step_00000002"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"step": "2"}', b"\xff\xfe"])
def test_a_damaged_best_json_does_not_lose_the_best(tmp_path: Path, content: bytes) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        writer.submit(make(step), Best(1, "val/loss", 0.5))
    writer.finish()
    (tmp_path / "best.json").write_bytes(content)
    assert ckpt.best_checkpoint(tmp_path, print) == tmp_path / "step_00000001"


def test_damaged_checkpoints_never_count_as_the_newest_when_pruning(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        damage(ckpt.write_checkpoint(tmp_path, make(step)))
    writer = CheckpointWriter(tmp_path, keep_last=2)
    for step in (5, 15, 25):  # a resume from before the damaged ones
        writer.submit(make(step))
        writer.finish()
        assert ckpt.problems_of(ckpt.step_directory(tmp_path, step)) == []
    assert ckpt.steps_in(tmp_path) == [15, 25, 30]
    writer.submit(make(30))
    writer.finish()
    assert ckpt.steps_in(tmp_path) == [25, 30]
    assert ckpt.newest_good(tmp_path, print) == tmp_path / "step_00000030"


def test_a_best_one_that_is_damaged_is_said_and_the_one_before_it_taken(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=3)
    for step, best in ((1, 1), (2, 2), (3, 2)):
        writer.submit(make(step), Best(best, "val/loss", 1 / best))
    writer.finish()
    damage(tmp_path / "step_00000002")
    said: list[str] = []
    assert ckpt.best_checkpoint(tmp_path, said.append) == tmp_path / "step_00000001"
    assert "step_00000002" in said[0] and "damaged" in said[-1]


def test_no_whole_checkpoint_left_is_a_refusal(tmp_path: Path) -> None:
    assert ckpt.newest_good(tmp_path, print) is None
    for step in (1, 2):
        damage(ckpt.write_checkpoint(tmp_path, make(step)))
    with pytest.raises(UserError, match="expected a whole checkpoint, found 2 of which none is"):
        ckpt.newest_good(tmp_path, lambda line: None)


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_was(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(recipe, run, ["train.max_steps=1"])
    damage(run / "checkpoints" / "step_00000001")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="expected a whole checkpoint, found 1 of which none is"):
        train_run(recipe, run, ["train.max_steps=2", "optim.lr=1e-2"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_left_as_it_was(
    recipe: Path, tmp_path: Path, damaged: bool
) -> None:
    run = tmp_path / "run"
    train_run(recipe, run, ["train.max_steps=1"])
    shutil.rmtree(run / "checkpoints")
    if damaged:
        (run / "status.json").write_text("{")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"checkpoints: expected (the|a) checkpoint.*, found none"):
        train_run(recipe, run, ["train.max_steps=2"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_was_counted_is_that_of_the_step_however_late_a_checkpoint_is_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ckpt.write_checkpoint

    def late(directory: Path, checkpoint: ckpt.Checkpoint) -> Path:
        time.sleep(0.3)  # the next step is counted meanwhile
        return write(directory, checkpoint)

    overrides = ["train.max_steps=2", "train.checkpoint_every=1", "tracking=[]"]
    train_run(recipe, tmp_path / "ends", ["train.max_steps=1", *overrides[1:]])
    monkeypatch.setattr(ckpt, "write_checkpoint", late)
    train_run(recipe, tmp_path / "goes on", overrides)
    counted, whole = (
        ckpt.read_checkpoint(tmp_path / run / "checkpoints" / "step_00000001").tensors["metrics"]
        for run in ("goes on", "ends")
    )
    assert whole and counted.keys() == whole.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(counted[name], tensor)] == []


def test_every_bit_of_a_manifest_and_every_cut_of_it_is_a_line_or_harmless(tmp_path: Path) -> None:
    """Seeded: 400 flips and 60 cuts; what is still whole is read as it was written."""
    written = make(7)
    path = ckpt.write_checkpoint(tmp_path, written)
    good = (path / ckpt.MANIFEST).read_bytes()
    draw = random.Random(11)
    spoilt = [good[: draw.randrange(len(good))] for _ in range(60)]
    for _ in range(400):
        content = bytearray(good)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        spoilt.append(bytes(content))
    spoilt += [b"", b"[]", b"null", b"{}", b"7", b'"text"', b"[" * 100_000]
    for content in spoilt:
        (path / ckpt.MANIFEST).write_bytes(content)
        problems = ckpt.problems_of(path)
        assert all(line.startswith(str(path)) and "\n" not in line for line in problems)
        if not problems:
            assert ckpt.read_checkpoint(path).state == written.state
        ckpt.known_bests(tmp_path)


@pytest.mark.parametrize("lost", ["bytes", "sha256"])
def test_a_manifest_without_hashes_or_sizes_is_not_whole(tmp_path: Path, lost: str) -> None:
    path = ckpt.write_checkpoint(tmp_path, make(7))
    manifest = json.loads((path / ckpt.MANIFEST).read_text())
    del manifest["files"]["state.json"][lost]
    (path / ckpt.MANIFEST).write_text(json.dumps(manifest))
    assert "no name, size and SHA-256 of 'state.json'" in ckpt.problems_of(path)[0]
    manifest["files"] = {}
    (path / ckpt.MANIFEST).write_text(json.dumps(manifest))
    assert "files are missing" in ckpt.problems_of(path)[0]
