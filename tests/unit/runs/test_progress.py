"""How far a training is, and what an epoch has reached: in whole numbers, and not too often."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from mtl_dist.evaluator import BaselineMetrics, Evaluation
from mtl_dist.results import headlines, results_table
from mtl_dist.runs.progress import ProgressSink
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tracking.sink import Row
from mtl_dist.training.epoch_table import EpochTable
from mtl_dist.training.plan import Plan
from tests.unit.tasks.test_contract import SETTINGS

PLAN = Plan(100, 300, 16, 1, seed=0, evaluate_every=1, checkpoint_every=None, log_every=1)
TASKS = build_tasks(
    {
        name: SETTINGS.validate_python({"kind": kind})
        for name, kind in (("digit", "classification"), ("age", "regression"))
    },
    {
        "digit": TaskInfo("classification", ("a", "b"), 4, (1, 3)),
        "age": TaskInfo("regression", num_labelled=4, mean=4.0),
    },
)


def row(step: int) -> Row:
    metrics = {"step/loss": 2.5, "step/digit/loss": 1.25, "step/age/loss": 0.5}
    return Row("step", step, step * 0.16, 0.0, metrics | {"images_per_s": 16.0, "data_wait": 0.034})


def test_without_a_terminal_a_line_comes_at_once_and_then_ever_more_seldom() -> None:
    now = [0.0]
    said: list[str] = []
    sink = ProgressSink(PLAN, said.append, memory=lambda: 3 << 29, clock=lambda: now[0])
    times = []
    for second in range(200):
        now[0] = float(second)
        before = len(said)
        sink.row(row(1 + second % 18))
        times += [second] if len(said) > before else []
    assert times == [0, 30, 90]
    assert said[0] == (
        "epoch 1/3  step 1/19  loss 2.5 (digit 1.25, age 0.5)  16 images/s  18 s left, evaluations apart  "
        "data wait 3%  memory 1.5 GiB"
    )


@pytest.mark.parametrize(
    ("step", "words"), [(6, "epoch 1/3  step 6/19"), (7, "epoch 2/3"), (19, "epoch 3/3  step 19/19")]
)
def test_epochs_and_steps_are_whole_numbers_within_the_plan(step: int, words: str) -> None:
    """Step 6 reaches position 96 of 100, step 7 is the first that ends in the second epoch."""
    assert words in ProgressSink(PLAN, print).line(row(step))


def test_the_step_that_ends_an_epoch_is_of_that_epoch() -> None:
    plan = Plan(80, 160, 8, 1, seed=0, evaluate_every=1, checkpoint_every=None, log_every=1)
    words = [ProgressSink(plan, print).line(row(step)).partition("  loss")[0] for step in (1, 10, 11, 20)]
    assert words == [
        "epoch 1/2  step 1/20",
        "epoch 1/2  step 10/20",
        "epoch 2/2  step 11/20",
        "epoch 2/2  step 20/20",
    ]


def test_in_a_terminal_a_table_has_a_row_for_each_task() -> None:
    shown: list[Any] = []
    ProgressSink(PLAN, print, shown.append).row(row(7))
    console = Console(file=io.StringIO(), width=80)
    console.print(shown[0])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(text.splitlines()) == 5
    for words in ("epoch 2/3  step 7/19", "digit  1.2500", "age    0.5000", "data wait 3%"):
        assert words in text, text


def test_an_epoch_s_rows_hold_the_best_so_far_also_that_before_a_resume() -> None:
    before = {"kind": "epoch", "step": 1, "epoch": 1.0, "val/digit/accuracy": 0.75, "val/age/mae": 2.0}
    table = EpochTable(TASKS, [json.dumps(before) + "\n"])
    table.baselines["digit"] = BaselineMetrics("majority", {"accuracy": 0.5})
    assert table.lines({"val/digit/accuracy": 0.7, "val/age/mae": 1.5}) == [
        "  digit  accuracy  0.7000  best 0.7500  majority 0.5000",
        "  age    mae       1.5000  best 1.5000",
    ]
    assert table.lines({"train/loss": 1.0}) == []


def test_in_80_columns_nothing_of_a_result_is_cut() -> None:
    """The longest name of a metric, beside an interval and a verdict of the longest kind."""
    name = "attributes_of_a_photograph"
    tasks = build_tasks(
        {name: SETTINGS.validate_python({"kind": "multilabel"})},
        {name: TaskInfo("multilabel", ("a", "b"), 4, (1, 3))},
    )
    metrics = {metric: 0.5 for metric in ("mean_average_precision", "a_metric_of_the_user_s_own" * 2)}
    constant = {name: BaselineMetrics("majority", metrics)}
    evaluation = Evaluation(1.0, {name: metrics}, {}, 4, baselines=constant)
    console = Console(file=io.StringIO(), width=80)
    for table in (headlines(evaluation, tasks, None), results_table({"val": evaluation, "test": evaluation})):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "mean_average_precision " in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.replace("\n", "").replace(" ", "").count("user_s_own") > 0


def test_a_result_is_better_than_a_constant_answer_where_it_is_better() -> None:
    constant = {
        "digit": BaselineMetrics("majority", {"accuracy": 0.5}),
        "age": BaselineMetrics("mean", {"mae": 2.0}),
    }
    evaluation = Evaluation(1.0, {"digit": {"accuracy": 0.7}, "age": {"mae": 2.5}}, {}, 4, baselines=constant)
    console = Console(file=io.StringIO(), width=120)
    console.print(headlines(evaluation, TASKS, None))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1].split() == ["digit", "accuracy", "0.7000", "majority", "0.5000", "better"]
    assert lines[2].split() == ["age", "mae", "2.5000", "mean", "2.0000", "not", "better"]
