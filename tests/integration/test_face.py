"""Training from Python: a run as an object, and a process that is left as it was found."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import mtl_dist
from mtl_dist.stopping import STOP_SIGNALS
from tests.tiny_datasets import write_dataset
from tests.tiny_runs import rows, write_recipe

pytestmark = pytest.mark.slow

SHORT = {"train.epochs": 1, "train.evaluate_at_end": True, "tracking": []}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory / "tiny", {"train": 30, "val": 9, "test": 7})
    return write_recipe(directory, directory / "tiny")


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> mtl_dist.Run:
    return mtl_dist.train(recipe, SHORT, run_dir=tmp_path_factory.mktemp("runs") / "run")


@contextmanager
def unchanged() -> Iterator[None]:
    """Fails where the process is not as it was."""

    def state() -> dict[str, object]:
        root = logging.getLogger()
        return {
            "group": torch.distributed.is_initialized(),
            "signals": [signal.getsignal(number) for number in STOP_SIGNALS],
            "logging": (root.level, list(root.handlers), root.disabled, logging.root.manager.disable),
            "environment": dict(os.environ),
            "directory": Path.cwd(),
        }

    before = state()
    yield
    assert state() == before


def test_a_run_says_what_was_asked_for_and_what_came_out(run: mtl_dist.Run) -> None:
    assert run.recipe.train.epochs == 1
    assert run.status is not None and (run.status.state, run.status.step) == ("done", 4)
    assert 0 <= run.metrics["test"]["digit"]["accuracy"] <= 1
    assert run.history["step"] == [4]
    assert run.best is not None and run.best.metric == "val/loss"
    assert run.best.value == run.history["val"]["loss"][0]
    assert repr(run) == f"Run({run.path}, done at step 4 of 4, best val/loss {run.best.value:.4g} at step 4)"


def test_a_run_evaluates_and_predicts_and_can_be_opened_again(run: mtl_dist.Run) -> None:
    before = run.metrics
    assert run.evaluate("test") == before["test"]
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    answer = run.predict(image)
    assert set(answer) == {"digit", "value", "tags", "shape"}
    assert len(mtl_dist.Run(str(run.path)).predict([image, image])) == 2
    assert mtl_dist.load(run.path).predict(image)["value"] == answer["value"]


def test_a_run_writes_its_page_and_is_taken_out_from_python_too(run: mtl_dist.Run, tmp_path: Path) -> None:
    page = run.report(str(tmp_path / "page.html"), pictures=False)
    assert page.read_text().lstrip().startswith("<!doctype html>")
    model = mtl_dist.load(run.export("safetensors", tmp_path / "model"))
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    answers = [made.predict(image)["digit"]["class_name"] for made in (model, run)]
    assert answers[0] == answers[1]
    with pytest.raises(mtl_dist.UserError, match="--format: expected onnx, torch, safetensors, found 'onx'"):
        run.export("onx")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", [{}, {"engine.zero_stage": 2}], ids=["accelerate", "deepspeed"])
def test_training_leaves_the_process_as_it_was_and_a_second_one_repeats_the_first(
    recipe: Path, tmp_path: Path, engine: dict[str, int]
) -> None:
    how = SHORT | {"train.max_steps": 2, "train.evaluate_at_end": False} | engine
    found = []
    for name in ("first", "second"):
        with unchanged():
            run = mtl_dist.train(recipe, how, run_dir=tmp_path / name)
        found.append(rows(run.path, "step"))
    assert found[0] == found[1]


def test_a_refused_recipe_leaves_the_process_as_it_was(recipe: Path, tmp_path: Path) -> None:
    with unchanged(), pytest.raises(mtl_dist.UserError, match=r"model\.norm"):
        mtl_dist.train(recipe, "model.norm=sync", run_dir=tmp_path / "run")


def test_a_run_can_be_trained_in_a_thread_and_goes_on_where_it_ended(recipe: Path, tmp_path: Path) -> None:
    found: list[mtl_dist.Run] = []
    how = SHORT | {"train.max_steps": 1, "train.evaluate_at_end": False}
    thread = threading.Thread(
        target=lambda: found.append(mtl_dist.train(recipe, how, run_dir=tmp_path / "run"))
    )
    thread.start()
    thread.join()
    resumed = found[0].resume("train.max_steps=3")
    assert resumed.path == found[0].path
    assert [row["step"] for row in resumed.rows if row["kind"] == "step"] == [1, 2, 3]


def test_from_python_too_data_may_move_and_a_run_begin_with_another_ones_weights(
    recipe: Path, run: mtl_dist.Run, tmp_path: Path
) -> None:
    moved = f"data.train=[{{path: {shutil.copytree(recipe.parent / 'tiny', tmp_path / 'moved')}}}]"
    with pytest.raises(mtl_dist.UserError, match="--data-moved"):
        run.resume(moved)
    assert run.resume(moved, data_moved=True).status.step == run.status.step  # type: ignore[union-attr]
    how = {"train.max_steps": 1, "train.evaluate_at_end": False}
    began = mtl_dist.train(recipe, how, run_dir=tmp_path / "new", start_from=run)
    assert began.recipe.start_from == run.path.absolute()
