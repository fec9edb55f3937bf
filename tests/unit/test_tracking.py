"""A run's records: one row per event, cut back to the checkpoint when the run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mtl_dist.curves import panels_of
from mtl_dist.tracking import Tracker, history_of, truncated_rows


def fill(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.record("step", step, step / 2, {"train/loss": 1 / step})
        if step % 2 == 0:
            tracker.record("epoch", step, step / 2, {"train/loss": 1 / step, "val/digit/accuracy": step / 10})
    tracker.update_history()
    tracker.draw()
    tracker.close()


def without_times(path: Path) -> list[dict[str, object]]:
    return [
        {k: v for k, v in json.loads(line).items() if k != "time"} for line in path.read_text().splitlines()
    ]


def test_a_resumed_record_equals_one_that_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    fill(Tracker(whole, 0), range(1, 9))
    fill(Tracker(parts, 0), range(1, 7))  # killed after step 6, the last checkpoint is of step 4
    fill(Tracker(parts, 4), range(5, 9))
    assert without_times(parts / "metrics.jsonl") == without_times(whole / "metrics.jsonl")
    assert json.loads((parts / "history.json").read_text()) == json.loads(
        (whole / "history.json").read_text()
    )
    assert (parts / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_learning_curves_show_the_monitored_metric_of_any_number() -> None:
    names = ["loss", "digit/loss", "digit/accuracy", "digit/f1", "digit/recall", "digit/auroc", "age/loss"]
    history = {"train": {"loss": [1.0]}, "val": {name: [1.0] for name in names}}
    shown = ["digit/loss", "digit/auroc", "digit/accuracy", "digit/f1"]
    assert panels_of(history, "val/digit/auroc") == [["loss"], shown, ["age/loss"]]


def test_a_last_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    assert truncated_rows(path, 5) == [{"kind": "step", "step": 1}]
    assert path.read_text() == '{"kind": "step", "step": 1}\n'


def test_an_undefined_figure_is_null_and_keeps_its_place(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0)
    tracker.record("epoch", 1, 1.0, {"val/digit/auroc": math.nan})
    tracker.record("epoch", 2, 2.0, {"val/digit/auroc": 0.9})
    tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert history_of(rows)["val"] == {"digit/auroc": [None, 0.9]}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(None, 0)
    fill(tracker, range(1, 4))
    tracker.say("hello")
    assert list(tmp_path.iterdir()) == []
