"""A run's record: one row per event, cut back to the checkpoint when the run goes on; no sink hurts a run."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from mtl_dist.figures.run_figures import RunFigures
from mtl_dist.status import Status
from mtl_dist.tracking.files import FilesSink, history_of, read_rows
from mtl_dist.tracking.registry import open_tracker
from mtl_dist.tracking.sink import Row, RunFacts, Sink
from mtl_dist.tracking.tracker import Tracker


def fill(directory: Path, steps: range, resumed_step: int = 0) -> None:
    tracker = open_tracker(directory, resumed_step=resumed_step)
    for step in steps:
        tracker.record("step", step, step / 2, {"step/loss": 1 / step})
        if step % 2 == 0:
            tracker.record("epoch", step, step / 2, {"train/loss": 1 / step, "val/digit/accuracy": step / 10})
    tracker.close()
    RunFigures(directory).draw_curves()


def without_times(path: Path) -> list[dict[str, object]]:
    return [
        {k: v for k, v in json.loads(line).items() if k != "time"} for line in path.read_text().splitlines()
    ]


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: the values by tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }


class Failing(Sink):
    """Raises from its nth row on."""

    def __init__(self, after: int = 0) -> None:
        self.left = after

    def row(self, row: Row) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the service\nis gone")


class Kept(Sink):
    def __init__(self, run: RunFacts | None = None) -> None:
        self.run = run
        self.rows: list[Row] = []
        self.lines: list[str] = []
        self.closed = False

    def row(self, row: Row) -> None:
        self.rows.append(row)

    def text(self, line: str) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.closed = True


def test_a_resumed_record_equals_one_that_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    fill(whole, range(1, 9))
    fill(parts, range(1, 7))  # killed after step 6, the last checkpoint is of step 4
    fill(parts, range(5, 9), resumed_step=4)
    assert without_times(parts / "metrics.jsonl") == without_times(whole / "metrics.jsonl")
    assert json.loads((parts / "history.json").read_text()) == json.loads(
        (whole / "history.json").read_text()
    )
    assert (parts / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert scalars(parts) == scalars(whole)


def test_the_loss_of_a_step_and_the_mean_of_an_epoch_are_two_tags(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 5))
    found = scalars(tmp_path)
    assert sorted(found["step/loss"]) == [1, 2, 3, 4]
    assert sorted(found["train/loss"]) == [2, 4]


def test_a_last_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    assert read_rows(tmp_path) == [{"kind": "step", "step": 1}]
    FilesSink(tmp_path, resumed_step=5).close()
    assert path.read_text() == '{"kind": "step", "step": 1}\n'


def test_a_resumed_run_knows_what_it_will_write_again(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 7))
    sink = FilesSink(tmp_path, resumed_step=4)
    sink.close()
    assert sink.rewritten == {("step", 5), ("step", 6), ("epoch", 6)}


def test_an_undefined_metric_is_null_and_keeps_its_place(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    tracker.record("epoch", 1, 1.0, {"val/digit/auroc": math.nan})
    tracker.record("epoch", 2, 2.0, {"val/digit/auroc": 0.9})
    tracker.close()
    assert history_of(read_rows(tmp_path))["val"] == {"digit/auroc": [None, 0.9]}


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(None)
    tracker.record("step", 1, 0.5, {"step/loss": 1.0})
    tracker.say("hello")
    tracker.status(Status("running"))
    tracker.close()
    RunFigures(None).draw_curves()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_sink_that_raises_is_reported_once_and_the_others_go_on(tmp_path: Path) -> None:
    kept, screen = Kept(), io.StringIO()
    tracker = Tracker(
        tmp_path, {"chat": Failing(after=1), "kept": kept}, Console(file=screen, force_terminal=False)
    )
    for step in (1, 2, 3):
        tracker.record("step", step, 0.0, {"step/loss": 1.0})
    tracker.close()
    line = (
        "warning  tracking by chat failed and is switched off, training goes on: "
        "ConnectionError: the service is gone"
    )
    assert [row.step for row in kept.rows] == [1, 2, 3]
    assert kept.lines == [line]
    assert kept.closed
    assert screen.getvalue().splitlines() == [line]


def test_a_status_that_cannot_be_written_is_reported_once(tmp_path: Path) -> None:
    kept = Kept()
    tracker = Tracker(tmp_path / "gone", {"kept": kept})
    tracker.status(Status("running"))
    tracker.status(Status("running"))
    assert len(kept.lines) == 1
    assert kept.lines[0].startswith("warning  status.json cannot be written, training goes on: ")


def test_a_picture_that_cannot_be_drawn_is_reported_once(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 3))
    (tmp_path / "learning_curves.png").unlink()
    (tmp_path / "learning_curves.png").mkdir()
    lines: list[str] = []
    figures = RunFigures(tmp_path, say=lines.append)
    figures.draw_curves()
    figures.draw_curves()
    assert len(lines) == 1
    assert lines[0].startswith("warning  learning_curves.png cannot be drawn, training goes on: ")


def test_a_run_goes_on_where_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = """
        import sys
        from pathlib import Path
        from mtl_dist.results import print_results
        from mtl_dist.tracking.tracker import Tracker
        tracker = Tracker(Path(sys.argv[1]))
        for number in range(3):
            tracker.say(f"line {number}")
        print_results({})
        Path(sys.argv[1], "done").touch()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "done").exists()
