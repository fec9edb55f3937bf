"""`mtl compare` from a recipe to its table: every training a run of its own, interrupted, gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_datasets import write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RECIPE = """
tasks: {digit: {kind: classification, weight: 2.0}, tags: {kind: multilabel}}
data: {train: [{path: DATA}], image_size: 8, augment: none, workers: 0}
model: {backbone: simple_cnn, norm: group}
balance: {method: equal, diagnose_every: 2}
optim: {lr: 3.0e-3}
train: {epochs: 2, global_batch: 8, log_every: 1}
"""
RUNS = ("single-task-digit", "single-task-tags", "equal", "famo")


def status_of(run: Path) -> str:
    try:
        return str(json.loads((run / "status.json").read_text())["state"])
    except FileNotFoundError:
        return ""


def test_a_comparison_goes_on_where_it_was_interrupted_and_ends_with_all_figures(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": 30, "val": 12, "test": 12})
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.replace("DATA", str(tmp_path / "data")))
    command = [sys.executable, "-m", "mtl_dist", "compare", str(recipe), "--seeds", "1"]
    command += ["--methods", "famo", "--out", str(out)]
    first, last = out / RUNS[0] / "seed-0", out / RUNS[-1] / "seed-0"

    # A long run, interrupted in the middle of its training.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while status_of(out / RUNS[1] / "seed-0") == "" and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "the same command goes on from here" in said
    assert status_of(first) == "done"
    assert not last.exists()
    finished = (first / "metrics.jsonl").read_bytes()

    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (first / "metrics.jsonl").read_bytes() == finished
    assert [status_of(out / name / "seed-0") for name in RUNS] == ["done"] * len(RUNS)
    metrics = json.loads((out / "comparison.json").read_text())
    assert metrics["split"] == "test"
    assert list(metrics["contenders"]) == ["single-task", "equal", "famo"]
    for name, row in metrics["contenders"].items():
        assert row["num_runs"] == 1
        measured = json.loads(
            (
                out
                / ("single-task-tags" if name == "single-task" else name)
                / "seed-0/evaluation/metrics.json"
            ).read_text()
        )
        assert row["metrics"]["tags"]["macro_f1"]["values"] == [measured["test"]["tags"]["macro_f1"]]
        assert row["time_ratio_to_equal"] > 0
        assert 0.5 < row["memory_ratio_to_equal"] < 2
    assert set(metrics["conflicts"]) == {"equal", "famo"}
    assert "delta_m over tasks" in done.stdout
    assert (out / "comparison.png").is_file() and (out / "conflicts.png").is_file()

    # Nothing is left to train.
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert "seed 0: " not in again.stdout
    assert json.loads((out / "comparison.json").read_text()) == metrics
