"""A full disk, a run folder that is read-only, renamed or deleted: on, or one line and `failed`."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtl_dist import durable, results, status
from mtl_dist.checkpoint import CheckpointWriter, newest_good, steps_in
from mtl_dist.errors import UserError
from mtl_dist.figures import curves
from mtl_dist.prediction.records import open_records
from mtl_dist.run_folder import RunFolder, writing_to
from mtl_dist.runs.evaluation import evaluate_run
from mtl_dist.training.trainer import Trainer
from tests.full_disks import full_disk
from tests.killed_runs import Killing
from tests.tiny_runs import rows, train_run
from tests.undrawn import drawn
from tests.unit.test_checkpoint import make

FEW = ["train.epochs=2", "train.log_every=1"]


def refused(number: int) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def read_status_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


@pytest.mark.parametrize("limit", [100, 400])
def test_a_checkpoint_on_a_full_disk_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, limit: int
) -> None:
    """For real: no file may grow further than that, whoever writes it."""
    writer = CheckpointWriter(tmp_path / "checkpoints", keep_last=2)
    writer.submit(make(1))
    writer.finish()
    with full_disk(limit):
        writer.submit(make(2))
        with pytest.raises(UserError) as refusal:
            writer.finish()
    (line,) = str(refusal.value).splitlines()
    assert "File too large" in line and "Free some space" in line
    assert [path.name for path in writer.directory.iterdir()] == ["step_00000001"]
    writer.submit(make(2))  # there is space again
    writer.finish()
    assert steps_in(writer.directory) == [1, 2]


def test_a_module_imported_on_a_full_disk_is_no_broken_one_later(tmp_path: Path) -> None:
    """The tests themselves would break the environment that they run in."""
    module = tmp_path / "grown.py"
    module.write_text("".join(f"x{number} = {number}\n" for number in range(1000)))
    code = "from tests.full_disks import full_disk\nwith full_disk(100): import grown"
    here = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    for source in (code, "import grown; assert grown.x999 == 999"):
        environment = {key: value for key, value in here.items() if key != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run([sys.executable, "-c", source], env=environment, check=True)


def train_until(
    recipe: Path, run: Path, overrides: list[str], step: int, then: Callable[[], None]
) -> tuple[str, str]:
    """Train, with something happening after a step; how it ended, and the line."""
    count = 0
    log_step = Trainer._log_step

    def logged(trainer: Trainer, *args: Any) -> None:
        nonlocal count
        count += 1
        log_step(trainer, *args)
        if count == step:
            then()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_log_step", logged)
        try:
            return train_run(recipe, run, overrides), ""
        except UserError as error:
            (line,) = str(error).splitlines()
            return "failed", line


def test_a_run_whose_disk_is_full_fails_with_one_line_and_its_status_says_so(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def fill() -> None:
        deadline = time.monotonic() + 60
        while newest_good(run / "checkpoints", print) is None:  # it is written in the background
            assert time.monotonic() < deadline
            time.sleep(0.05)
        monkeypatch.setattr(os, "fsync", refused(errno.ENOSPC))
        monkeypatch.setattr(status, "write_text", refused(errno.ENOSPC))

    state, line = train_until(recipe, run, [*FEW, "train.checkpoint_every=2"], 3, fill)
    monkeypatch.undo()
    assert state == "failed"
    assert line.startswith(f"{run}: ") and "No space left on device" in line
    found = read_status_of(run)  # written over the old one, which has its place on the disk
    assert (found["state"], found["retry"]) == ("failed", False) and line in found["reason"]
    assert newest_good(run / "checkpoints", print) == run / "checkpoints" / "step_00000002"
    assert train_run(recipe, run, FEW) == "done"


@pytest.mark.parametrize("away", [shutil.rmtree, lambda run: run.rename(run.with_name("renamed"))])
def test_a_run_folder_that_is_renamed_or_deleted_is_not_made_again(
    recipe: Path, tmp_path: Path, away: Callable[[Path], object]
) -> None:
    run = tmp_path / "run"

    def vanish() -> None:
        away(run)

    state, line = train_until(recipe, run, [*FEW, "tracking=[]"], 2, vanish)
    assert state == "failed" and not run.exists()
    assert line.startswith(f"{run}: expected the run folder, found none")
    assert "renamed or deleted" in line


def test_what_is_only_looked_at_does_not_end_a_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pictures, the log's rows, the status and the peak memory; each is said once."""
    full = refused(errno.ENOSPC)
    monkeypatch.setattr(results, "draw_confusion", full)
    monkeypatch.setattr(curves, "save_png", full)
    monkeypatch.setattr(status, "write_text", full)
    monkeypatch.setattr(RunFolder, "write_peak_memory", full)
    run = tmp_path / "run"
    with drawn():
        assert train_run(recipe, run, [*FEW, "train.evaluate_at_end=true"]) == "done"
    said = capfd.readouterr().out
    assert said.count("status.json cannot be written") == 1
    assert said.count("learning_curves.png cannot be drawn") == 1
    assert said.count("environment.json cannot be written") == 1
    assert len(rows(run, "epoch")) == 2


def test_an_evaluation_that_cannot_be_kept_is_printed_and_one_line(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    train_run(recipe, run, ["train.max_steps=1"])
    monkeypatch.setattr(RunFolder, "write_metrics", refused(errno.EROFS))
    with pytest.raises(UserError) as refusal:
        evaluate_run(run, "val")
    (line,) = str(refusal.value).splitlines()
    assert line.startswith(f"{run}: expected to write to it, found: {os.strerror(errno.EROFS)}.")
    assert "accuracy" in capfd.readouterr().out


def test_answers_that_cannot_be_written_are_one_line_and_leave_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    with (
        pytest.raises(UserError) as refusal,
        open_records(out, {"image": ""}) as write,
        full_disk(100),
    ):
        for _ in range(10_000):
            write({"image": "a.png"})
    assert str(refusal.value) == f"{out}: expected a file that can be written, found: File too large."
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="found: File exists"),
        open_records(tmp_path / "file" / "x.csv", {}),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refusal:
        train_run(recipe, tmp_path / "file" / "run", ["train.max_steps=1"])
    (line,) = str(refusal.value).splitlines()
    assert "Not a directory" in line


def test_errors_about_other_files_keep_their_own_words(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "data" / "x.tar")),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ):
        assert not durable.is_about(error, tmp_path / "run")
        with pytest.raises(type(error)), writing_to(tmp_path / "run"):
            raise error


# ---------------------------------------------------------------- of two ranks, the disk of one
@pytest.mark.slow
def test_where_the_disk_of_another_machine_is_full_the_status_names_its_rank_s_cause(
    recipe: Path, tmp_path: Path
) -> None:
    """Rank 1 alone keeps remote shards in a cache of its own machine, and that is full."""
    data = f"data.train=[{{path: file://{recipe.parent / 'tiny'}}}]"
    cache = "data.cache={dir: cache}"
    run = tmp_path / "run"
    attempt = Killing().attempt(recipe, run, [*FEW, data, cache, "tracking=[]"], ranks=2, full=1, grace_s=60)
    said = (tmp_path / "run.1.log").read_text()
    assert attempt.codes == [2, 2], said
    found = read_status_of(run)
    assert found["state"] == "failed" and "data.cache.dir" in found["reason"], found["reason"]
    for rank in (0, 1):
        said = (tmp_path / f"run.{rank}.log").read_text()
        assert "data.cache.dir: expected" in said and "Traceback" not in said


@pytest.mark.exhaustive
def test_where_the_disk_of_the_run_folder_is_full_every_rank_ends_and_the_status_says_so(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    few = [*FEW, "train.checkpoint_every=2", "tracking=[]"]
    attempt = Killing().attempt(recipe, run, few, ranks=2, full=0, grace_s=60)
    said = (tmp_path / "run.0.log").read_text()
    assert attempt.codes[0] == 2 and 0 not in attempt.codes, said
    found = read_status_of(run)
    assert found["state"] == "failed" and "File too large" in found["reason"], found["reason"]


@pytest.mark.exhaustive
def test_where_the_run_folder_of_two_ranks_is_deleted_both_end_with_that_as_the_cause(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def delete() -> None:
        while not (run / "checkpoints" / "best.json").exists():
            time.sleep(0.005)
        run.rename(tmp_path / "renamed")

    thread = threading.Thread(target=delete, daemon=True)
    thread.start()
    long = ["train.epochs=2000", "train.checkpoint_every=2", "tracking=[]"]
    attempt = Killing().attempt(recipe, run, long, ranks=2, grace_s=60)
    assert not run.exists() and 0 not in attempt.codes
    assert "expected the run folder, found none" in (tmp_path / "run.0.log").read_text()
