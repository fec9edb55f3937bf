"""Sweeps here, with pretended trainings: what is planned, ranked, written, widened; and lists of runs."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mtl_dist.cli import app
from mtl_dist.config.loading import to_yaml
from mtl_dist.data.transforms import AugmentSettings
from mtl_dist.errors import UserError
from mtl_dist.launch.local import Launch
from mtl_dist.recipe import load_recipe
from mtl_dist.report.run_list import _text, differing_settings
from mtl_dist.report.sweep import Point, plan_sweep, run_sweep
from mtl_dist.run_folder import RunFolder

RECIPE = """
tasks: {digit: {kind: classification}, value: {kind: regression}}
data: {train: [{path: data}], image_size: 8}
model: {backbone: simple_cnn}
monitor: {metric: val/digit/accuracy}
"""


def write_recipe(directory: Path) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def write_run(directory: Path, recipe: Any, accuracy: float | None, state: str = "done") -> None:
    """Leave what a training would."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(to_yaml(recipe))
    status = {"state": state, "epoch": 1.0, "metric": "val/digit/accuracy", "best": accuracy}
    (directory / "status.json").write_text(
        json.dumps(status | {"reason": "the loss is nan" if state == "failed" else ""})
    )
    if state == "done":
        metrics = {
            split: {"digit": {"accuracy": accuracy and accuracy - less, "num_samples": 9}}
            for split, less in (("val", 0.0), ("test", 0.1))
        }
        RunFolder(directory).evaluation.mkdir(exist_ok=True)
        (directory / "evaluation" / "metrics.json").write_text(json.dumps(metrics))


ACCURACIES = {"1e-3": 0.5, "1e-2": 0.7, "0.1": 0.6}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the points that were trained; the one with the rate 9 fails."""
    names = []

    def pretend(
        points: Sequence[Point],
        nproc: int | None,
        parallel: int,
        started: Callable[[Point], None],
        ended: Callable[[Point, int], None],
        tags: Sequence[str],
    ) -> int:
        for point in points:
            if not point.is_done:
                started(point)
                rate, seed = point.values["optim.lr"], float(point.values.get("train.seed", 0))
                failed = rate == "9"
                accuracy = None if failed else ACCURACIES[rate] + 0.01 * seed
                write_run(point.directory, point.recipe, accuracy, "failed" if failed else "done")
                RunFolder(point.directory).change_tags(tags)
                names.append(point.directory.name)
                ended(point, 1 if failed else 0)
        return 0

    monkeypatch.setattr("mtl_dist.report.sweep.train_all", pretend)
    return names


def sweep(recipe: Path, out: Path, *overrides: str, **options: Any) -> tuple[int, str]:
    text = io.StringIO()
    console = Console(file=text, width=60)
    return run_sweep(plan_sweep(recipe, overrides, out), out, console, **options), text.getvalue()


def test_a_sweep_ranks_its_points_and_says_which_is_best(tmp_path: Path, trained: list[str]) -> None:
    out = tmp_path / "out"
    code, said = sweep(write_recipe(tmp_path), out, "optim.lr=1e-3,1e-2,0.1", "train.epochs=2")
    assert code == 0
    found = json.loads((out / "sweep.json").read_text())
    assert [run["values"]["optim.lr"] for run in found["runs"]] == ["1e-2", "0.1", "1e-3"]
    assert (found["metric"], found["mode"]) == ("val/digit/accuracy", "max")
    assert found["runs"][0]["metrics"]["test/digit/accuracy"] == pytest.approx(0.6)
    assert f"best: val/digit/accuracy 0.7000 in {out / 'lr=1e-2'}" in said
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(out / "lr=1e-2.yaml").train.epochs == 2


def test_a_wider_sweep_trains_only_its_new_points(tmp_path: Path, trained: list[str]) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    sweep(recipe, out, "optim.lr=1e-3,1e-2")
    sweep(recipe, out, "optim.lr=1e-3,0.1,1e-2")
    assert trained == ["lr=1e-3", "lr=1e-2", "lr=0.1"]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, trained: list[str]) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    sweep(recipe, out, "optim.lr=1e-3,1e-2")
    with pytest.raises(UserError, match=r"^train: expected the same as in .*--out"):
        sweep(recipe, out, "optim.lr=1e-3,1e-2", "train.epochs=2")


def test_seeds_are_averaged_and_the_best_mean_comes_first(tmp_path: Path, trained: list[str]) -> None:
    out = tmp_path / "out"
    _, said = sweep(write_recipe(tmp_path), out, "optim.lr=1e-3,1e-2", "train.seed=0,1,2")
    first = json.loads((out / "sweep.json").read_text())["over_seeds"][0]
    assert first["values"] == {"optim.lr": "1e-2"}
    assert first["mean"] == pytest.approx(0.71)
    assert "lr=1e-2: 0.7100 ±0.0100 over 3 seeds" in said


def test_a_point_that_fails_is_told_and_the_others_go_on(tmp_path: Path, trained: list[str]) -> None:
    code, said = sweep(write_recipe(tmp_path), tmp_path / "out", "optim.lr=9,1e-2", tags=["lr"])
    assert code == 1
    assert "lr=9 failed: the loss is nan" in said
    assert trained == ["lr=9", "lr=1e-2"]


WAITS = (
    "import signal, time; signal.signal(15, lambda *_: exit(143)); open({!r}, 'w')\n"
    "for _ in range(600): time.sleep(0.1)  # a signal just before a call is acted on after it"
)


def test_a_sweep_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    stops = True

    def pretend(point: Point, nproc: int | None, parallel: int, slot: int, tags: Sequence[str]) -> Launch:
        started.append(point.directory.name)
        code = "pass"
        if stops and len(started) == 2:
            write_run(point.directory, point.recipe, None, "stopped")
            os.kill(os.getpid(), signal.SIGTERM)
            code = WAITS.format(str(tmp_path / "waits"))
        else:
            write_run(point.directory, point.recipe, ACCURACIES[point.values["optim.lr"]])
        return Launch((sys.executable, "-S", "-c", code), 1, 1)

    monkeypatch.setattr("mtl_dist.launch.series.launch_of", pretend)
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    code, said = sweep(recipe, out, "optim.lr=1e-3,1e-2,0.1")
    assert code == 128 + signal.SIGTERM
    assert "Stopped; the same command goes on from here." in said
    assert started == ["lr=1e-3", "lr=1e-2"] and not (out / "sweep.json").exists()
    stops = False
    code, said = sweep(recipe, out, "optim.lr=1e-3,1e-2,0.1")
    assert code == 0 and "3 trainings, 1 of them done" in said
    assert started[2:] == ["lr=1e-2", "lr=0.1"]
    assert [run["state"] for run in json.loads((out / "sweep.json").read_text())["runs"]] == ["done"] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=1e-3"], "expected at least one A.B=1,2,3 with several values"),
        (["optim.lr=1e-3,x"], "optim.lr: expected"),
        (["monitor.metric=val/loss,val/digit/loss"], "--by: expected a metric"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(
    tmp_path: Path, trained: list[str], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sweep(write_recipe(tmp_path), tmp_path / "out", *overrides)
    assert trained == [] and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- lists of runs
@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs below runs/tiny, one of them without metrics."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    for name, lr, accuracy in (("a", 0.1, 0.6), ("b", 0.2, 0.8), ("c", 0.3, None)):
        write_run(Path("runs/tiny") / name, load_recipe(recipe, [f"optim.lr={lr}"]), accuracy)
    RunFolder(Path("runs/tiny/a")).change_tags(["good", "old"])
    RunFolder(Path("runs/tiny/b")).change_tags(["good"])
    return tmp_path


def mtl(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_runs_are_listed_with_what_they_reached_best_first_if_asked(study: Path) -> None:
    lines = mtl("runs", "--by", "test/digit/accuracy", "--columns", "optim.lr").splitlines()
    assert [line.split()[:5] for line in lines] == [
        ["run", "state", "epoch", "test/digit/accuracy", "optim.lr"],
        ["tiny/b", "done", "1.00", "0.7000", "0.2"],
        ["tiny/a", "done", "1.00", "0.5000", "0.1"],
        ["tiny/c", "done", "1.00", "-", "0.3"],
    ]
    assert mtl("runs", "--best", "val/digit/accuracy") == "runs/tiny/b\n"


def test_runs_that_follow_a_mean_are_ranked_by_any_metric_as_others_are(study: Path) -> None:
    one, two = "{mean: {val/digit/accuracy: 2}}", "{mean: {val/digit/accuracy: 2, val/value/r2: 1}}"
    recipe = write_recipe(study)
    recipe.write_text(RECIPE.replace("monitor: {metric: val/digit/accuracy}", ""))
    for name, mean, accuracy in (("a", one, 0.6), ("b", two, 0.8)):
        run = Path("runs/tiny") / name
        write_run(run, load_recipe(recipe, [f"monitor={mean}"]), accuracy)
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps(status | {"metric": "val/weighted_mean"}))
    for metric in ("val/digit/accuracy", "val/weighted_mean"):
        assert mtl("runs", "runs/tiny/a", "runs/tiny/b", "--best", metric) == "runs/tiny/b\n"
    assert plan_sweep(recipe, [f"monitor={two}", "optim.lr=1,2"], study / "s").metric == "val/weighted_mean"
    assert plan_sweep(recipe, [f"monitor={one},{two}"], study / "s").metric is None


def test_a_damaged_file_of_one_run_takes_away_nothing_of_the_others(study: Path) -> None:
    (study / "runs" / "tiny" / "c" / "evaluation" / "metrics.json").write_text('{"a":')
    lines = [line.split() for line in mtl("runs").splitlines()]
    assert [line[:2] for line in lines if line[0].startswith("tiny/")] == [
        ["tiny/a", "done"],
        ["tiny/b", "done"],
        ["tiny/c", "done,"],
    ]


def test_runs_side_by_side_show_the_settings_that_differ_and_every_metric(study: Path) -> None:
    lines = [line.split() for line in mtl("runs", "runs/tiny/a", "runs/tiny/b", "--compare").splitlines()]
    assert ["optim.lr", "0.1", "0.2"] in lines
    assert ["test/digit/accuracy", "0.5000", "0.7000"] in lines
    assert not any(line[0].startswith("train.") for line in lines)


def test_tasks_that_not_all_runs_have_are_one_line_of_a_comparison() -> None:
    common = {"name": "a", "tasks.digit.kind": "classification", "optim.lr": "0.1"}
    first = common | {
        "tasks.colours.kind": "multilabel",
        "tasks.size.kind": "regression",
        "tasks.size.weight": "1",
    }
    second = common | {"name": "b", "tasks.digit.weight": "2"}
    assert differing_settings([first, second], "–") == {
        "tasks not in all": ["colours, size", "–"],
        "tasks.digit.weight": ["–", "2"],
    }
    assert differing_settings([first, first]) == {}


def test_a_preset_beside_single_values_differs_in_those_alone_that_it_has_otherwise() -> None:
    stated = AugmentSettings(crop_scale=(0.5, 1.0), flip=True, rotate=8).model_dump(mode="json")
    preset = {"data.augment": "standard", "optim.lr": "0.1"}
    single = {f"data.augment.{key}": _text(value) for key, value in stated.items()} | {"optim.lr": "0.1"}
    assert differing_settings([preset, single]) == {"data.augment.rotate": ["0.0", "8.0"]}
    assert differing_settings([preset, {**preset, "data.augment": "none"}]) == {
        "data.augment": ["standard", "none"]
    }


def test_tags_find_runs_are_added_and_taken_away(study: Path) -> None:
    assert [line.split()[0] for line in mtl("status", "--tag", "good").splitlines()] == [
        "run",
        "tiny/a",
        "tiny/b",
    ]
    assert "tiny/b" not in mtl("runs", "--tag", "good", "--tag", "old")
    assert mtl("tag", "runs/tiny/a", "new", "--remove", "old") == "runs/tiny/a: good new\n"
    refused = CliRunner().invoke(app, ["runs", "--tag", "bad"])
    assert refused.exit_code == 2
    assert "found none of 3. Their tags: good, new." in refused.output
    assert CliRunner().invoke(app, ["tag", "runs/tiny/a", "two words"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "val/digit/acuracy"], "val/digit/accuracy"),
        (["--columns", "optim.lrr"], "optim.lr"),
        (["runs/tiny/a", "--compare"], "at least two runs"),
    ],
)
def test_a_mistake_in_a_list_is_told_with_the_nearest_name(
    study: Path, arguments: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["runs", *arguments])
    assert done.exit_code == 2
    assert message in done.output
