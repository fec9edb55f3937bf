"""Comparing ways to balance: the arithmetic by hand-computed values, and what is planned for a recipe."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mtl_dist.errors import UserError
from mtl_dist.figures.conflicts import conflicts_in
from mtl_dist.recipe import load_recipe
from mtl_dist.report.compare import Run, compare
from mtl_dist.report.compare_metrics import Comparison, Row, Spread, delta_m, relative_drop, spreads
from mtl_dist.report.compare_plan import plan_comparison
from mtl_dist.report.compare_show import show, spread_text, to_json, write
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.regression import RegressionSettings

COMPARED = {"kind": ClassificationSettings.compared_modes(), "age": RegressionSettings.compared_modes()}
BASE = {
    "kind": {"accuracy": 0.8, "balanced_accuracy": 0.5, "macro_f1": 0.4, "auroc": 0.8},
    "age": {"mae": 2.0, "rmse": 4.0},
}
WORSE = {
    "kind": {"accuracy": 0.72, "balanced_accuracy": 0.5, "macro_f1": 0.42, "auroc": 0.76},
    "age": {"mae": 1.9, "rmse": 4.4},
}
RECIPE = """
tasks:
  digit: {kind: classification, weight: 2.0}
  value: {kind: regression}
data: {train: [{path: data}], image_size: 8}
model: {backbone: simple_cnn, heads: {digit: {hidden: [8]}}}
balance: {method: fixed, diagnose_every: 7}
optim: {task_lr: {value: 0.1}}
monitor: {metric: val/digit/accuracy, patience: 2}
train: {seed: 5, evaluate_at_end: false}
"""


def write_recipe(directory: Path, text: str = RECIPE) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


# ---------------------------------------------------------------- arithmetic
def test_a_drop_is_positive_where_it_is_worse_whatever_the_direction_of_the_metric() -> None:
    assert relative_drop("max", 0.72, 0.8) == pytest.approx(10)
    assert relative_drop("min", 1.9, 2.0) == pytest.approx(-5)
    assert relative_drop("max", -0.3, -0.2) == pytest.approx(50)
    assert math.isnan(relative_drop("max", 0.5, 0.0))


def test_the_three_conventions_of_delta_m_are_these() -> None:
    # Drops of kind: 10, 0, -5, 5; of age: -5, 10.
    found = delta_m(WORSE, BASE, COMPARED)
    assert found == {
        "main metrics": pytest.approx((10 - 5) / 2),
        "tasks": pytest.approx((2.5 + 2.5) / 2),
        "metrics": pytest.approx((10 + 0 - 5 + 5 - 5 + 10) / 6),
    }


def test_single_task_models_are_no_worse_than_themselves() -> None:
    assert set(delta_m(BASE, BASE, COMPARED).values()) == {0.0}


def test_an_undefined_metric_is_left_out_and_an_undefined_main_metric_is_said() -> None:
    without_f1 = {"kind": WORSE["kind"] | {"macro_f1": math.nan}, "age": WORSE["age"]}
    found = delta_m(without_f1, BASE, COMPARED)
    assert found["tasks"] == pytest.approx((15 / 3 + 2.5) / 2)
    without_main = {"kind": WORSE["kind"] | {"accuracy": math.nan}, "age": WORSE["age"]}
    assert math.isnan(delta_m(without_main, BASE, COMPARED)["main metrics"])


def test_the_spread_is_the_sample_standard_deviation() -> None:
    spread = Spread((1.0, 2.0, 3.0))
    assert (spread.mean, spread.deviation) == (2.0, 1.0)
    assert spread_text(spread, 2) == "2.00 ±1.00"
    assert spread_text(Spread((0.5,)), 3) == "0.500"
    assert spread_text(Spread((math.nan,)), 3) == "-"


def comparison() -> Comparison:
    def row(name: str, seconds: float, memory: float, with_delta: bool) -> Row:
        runs = [BASE, WORSE]
        deltas = [delta_m(run, BASE, COMPARED) for run in runs]
        delta = {how: Spread(tuple(d[how] for d in deltas)) for how in deltas[0]} if with_delta else {}
        return Row(name, 2, spreads(runs, COMPARED), delta, Spread((seconds,)), Spread((memory,)))

    rows = [row("single-task", 3.0, 1.0, False), row("equal", 2.0, 2.0, True), row("nash", 5.0, 3.0, True)]
    conflicts = conflicts_in([{"kind": "balance", "balance/cosine/kind/age": -0.5}])
    assert conflicts is not None
    failures = {"nash, seed 1": "UserError: the loss is nan"}
    return Comparison(COMPARED, "test", (0, 1), rows, {"equal": conflicts}, failures, ("a note",))


def test_costs_are_in_parts_of_those_of_the_control() -> None:
    found = to_json(comparison())["contenders"]
    assert [row["time_ratio_to_equal"] for row in found.values()] == [1.5, 1.0, 2.5]
    assert [row["memory_ratio_to_equal"] for row in found.values()] == [0.5, 1.0, 1.5]
    assert found["nash"]["delta_m_percent"]["over main metrics"]["mean"] == pytest.approx(1.25)


def test_a_comparison_is_a_table_json_and_pictures(tmp_path: Path) -> None:
    text = io.StringIO()
    show(comparison(), Console(file=text, width=40))
    shown = text.getvalue()
    for part in ("accuracy *", "delta_m over main metrics", "single-task", "0.7600 ±0.0566", "kind and age"):
        assert part in shown
    assert "nash, seed 1 has no result" in shown
    write(comparison(), tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["main_metrics"]["age"] == "mae"
    for name in ("comparison.png", "conflicts.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- plan
def test_the_control_and_the_tuned_weights_are_always_in_it(tmp_path: Path) -> None:
    plan = plan_comparison(write_recipe(tmp_path), [], ["cagrad:c=0.5:level=features"], 2)
    assert [c.name for c in plan.contenders] == [
        "single-task digit",
        "single-task value",
        "equal",
        "fixed",
        "cagrad:c=0.5:level=features",
    ]
    assert plan.seeds == (5, 6)
    recipes = {c.name: c.recipe for c in plan.contenders}
    cagrad = recipes["cagrad:c=0.5:level=features"]
    assert cagrad.balance.model_dump()["c"] == 0.5
    assert cagrad.balance.diagnose_every == 7
    # Tuned weights for the method that uses them, none for those that do not.
    assert recipes["fixed"].tasks["digit"].weight == 2.0
    assert recipes["equal"].tasks["digit"].weight == 1.0
    assert all(
        recipe.train.evaluate_at_end and recipe.monitor.patience is None for recipe in recipes.values()
    )
    assert any("patience" in note for note in plan.notes)


def test_a_single_task_recipe_is_the_given_one_without_the_other_tasks(tmp_path: Path) -> None:
    from mtl_dist.config.loading import to_yaml

    plan = plan_comparison(write_recipe(tmp_path), [], [], 1)
    digit, value = (contender.of_seed(9) for contender in plan.contenders[:2])
    assert (list(digit.tasks), list(value.tasks)) == (["digit"], ["value"])
    assert (digit.monitor.metric, value.monitor.metric) == ("val/digit/accuracy", "val/loss")
    assert (list(digit.optim.task_lr), list(value.model.heads)) == ([], [])
    assert digit.train.seed == 9
    for recipe in (digit, value):
        path = tmp_path / "again.yaml"
        path.write_text(to_yaml(recipe))
        assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("methods", "overrides", "line"),
    [
        (["cagrd"], [], "balance.method: "),
        (["cagrad:d=1"], [], "balance.d: "),
        (["cagrad:c"], [], "--methods: expected NAME or NAME:KEY=VALUE"),
        ([], ["tasks.value=null", "optim.task_lr={}"], "tasks: expected at least two to balance, found 1."),
    ],
)
def test_a_mistake_in_a_comparison_is_one_line(
    tmp_path: Path, methods: list[str], overrides: list[str], line: str
) -> None:
    with pytest.raises(UserError) as raised:
        plan_comparison(write_recipe(tmp_path), overrides, methods, 1)
    assert line in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path), tmp_path / "out"
    console = Console(file=io.StringIO())
    # The data is missing, so the first run refuses to start, and says why.
    with pytest.raises(UserError, match=r"single-task digit, seed 5: .*data"):
        compare(plan_comparison(path, [], [], 1), out, None, console)
    with pytest.raises(UserError, match=r"^optim: expected the same as in"):
        compare(plan_comparison(path, ["optim.lr=0.5"], [], 1), out, None, console)


# ---------------------------------------------------------------- runs, pretended
METRICS = {
    "digit": {"accuracy": 0.8, "balanced_accuracy": 0.5, "macro_f1": 0.4, "auroc": None, "loss": 1.0},
    "value": {"mae": 2.0, "rmse": 4.0},
}


def pretend_all(
    runs: Sequence[Run],
    nproc: int | None,
    parallel: int,
    started: Callable[[Run], None],
    ended: Callable[[Run, int], None],
) -> int:
    for run in runs:
        started(run)
        ended(run, pretend(run))
    return 0


def pretend(run: Run) -> int:
    """Leave what a training would; the one of famo with the second seed fails."""
    run.directory.mkdir(parents=True)
    failed = run.contender.name == "famo" and run.seed == 6
    tasks = [run.contender.single] if run.contender.single else ["digit", "value"]
    worse = 1.0 if run.contender.single else 1.1
    metrics = {
        task: {name: value and value * worse for name, value in METRICS[task].items()} for task in tasks
    }
    files = {
        "status.json": {
            "state": "failed" if failed else "done",
            "reason": "the loss is nan" if failed else "",
            "position": 100,
        },
        "environment.json": [{}, {"peak_memory_bytes": 100 * len(tasks)}],
    }
    for name, content in files.items():
        (run.directory / name).write_text(json.dumps(content))
    rates = [1.0, 100.0 / len(tasks), 50.0 / len(tasks)]
    steps = [{"kind": "step", "step": n, "images_per_s": rate} for n, rate in enumerate(rates)]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run.directory / "evaluation").mkdir()
    (run.directory / "evaluation" / "metrics.json").write_text(json.dumps({"val": metrics}))
    return 2 if failed else 0


def test_a_run_that_fails_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl_dist.report.compare.train_all", pretend_all)
    text = io.StringIO()
    plan = plan_comparison(write_recipe(tmp_path), [], ["famo"], 2)
    assert compare(plan, tmp_path / "out", None, Console(file=text, width=200)) == 0
    assert "famo, seed 6 has no result: the loss is nan" in text.getvalue()
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["split"] == "val"
    rows = found["contenders"]
    assert {name: row["num_runs"] for name, row in rows.items()} == {
        "single-task": 2,
        "equal": 2,
        "fixed": 2,
        "famo": 1,
    }
    # Accuracies 10% better, errors 10% worse; auroc is undefined everywhere.
    deltas = rows["famo"]["delta_m_percent"]
    assert deltas["over tasks"]["mean"] == pytest.approx((-10 + 10) / 2)
    assert deltas["over metrics"]["mean"] == pytest.approx((3 * -10 + 2 * 10) / 5)
    assert rows["equal"]["metrics"]["digit"]["auroc"] == {
        "mean": None,
        "deviation": None,
        "values": [None] * 2,
    }
    # The first logged rate does not count; single-task models one after the other take as long as both.
    assert rows["equal"]["seconds_per_image"]["mean"] == pytest.approx(2 * (1 / 100 + 1 / 50) / 2)
    assert rows["single-task"]["time_ratio_to_equal"] == pytest.approx(1.0)
    assert rows["single-task"]["memory_ratio_to_equal"] == pytest.approx(0.5)


def test_a_single_task_model_that_has_only_its_own_dataset_costs_what_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend_disjoint(runs: Sequence[Run], *rest: Any) -> int:
        code = pretend_all(runs, *rest)
        for run in runs:
            if run.contender.single == "value":
                status = run.directory / "status.json"
                status.write_text(status.read_text().replace("100", "40"))
        return code

    monkeypatch.setattr("mtl_dist.report.compare.train_all", pretend_disjoint)
    text = io.StringIO()
    plan = plan_comparison(write_recipe(tmp_path), [], [], 1)
    compare(plan, tmp_path / "out", None, Console(file=text, width=200))
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    # Half as long per image, for 100 and for 40 of the 100 images that the others see.
    assert found["contenders"]["single-task"]["time_ratio_to_equal"] == pytest.approx((1 + 0.4) / 2)
    note = "single-task value: trained on 40 samples, where others see 100: the datasets without"
    assert any(line.startswith(note) for line in found["notes"])
    assert note in text.getvalue()
