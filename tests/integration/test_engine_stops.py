"""A stop in the middle of an evaluation: all ranks leave it together, and the next start takes it up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from tests.tiny_datasets import write_dataset
from tests.tiny_runs import rows, tensors_at, train_run, write_recipe

pytestmark = pytest.mark.slow

NUM_STEPS = 12  # 3 epochs of 30 samples, 8 at a time
OVERRIDES = ["optim.ema=0.9", "train.evaluate_at_end=true"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory / "tiny", {"train": 30, "val": 40, "test": 20})
    return write_recipe(directory, directory / "tiny")


@pytest.fixture(scope="module")
def whole(recipe: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ranks.run(train_run, recipe, run, OVERRIDES) == ["done", "done"]
    return run


def train_stopped(recipe: Path, run: Path, overrides: list[str], evaluation: int, batch: int) -> str:
    """Train; the last rank is asked to stop at a batch of the evaluation of that number."""
    from mtl_dist import stopping
    from mtl_dist.runs import evaluation as run_evaluation

    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    begun: list[None] = []
    asked: list[None] = []
    kept = run_evaluation.evaluate

    def evaluate(root: object, loader: Iterator[object], *args: object, **kwargs: object) -> object:
        begun.append(None)

        def batches() -> Iterator[object]:
            for number, own in enumerate(loader):
                if len(begun) == evaluation and number == batch and is_last:
                    asked.append(None)
                yield own

        return kept(root, batches(), *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping.StopSignal, "requested", property(lambda self: bool(asked)))
        patch.setattr(stopping.StopSignal, "reason", property(lambda self: "test" if asked else ""))
        patch.setattr(run_evaluation, "evaluate", evaluate)
        return train_run(recipe, run, overrides)


@pytest.mark.parametrize(
    ("evaluation", "engine"),
    [(1, []), (3, []), (4, []), (5, []), (1, ["engine.zero_stage=3"])],
    ids=["middle", "last_epoch", "end_val", "end_test", "middle_zero3"],
)
def test_a_stop_during_an_evaluation_is_answered_at_once_and_nothing_is_lost(
    recipe: Path, ranks: RankPool, whole: Path, tmp_path: Path, evaluation: int, engine: list[str]
) -> None:
    run = tmp_path / "run"
    stopped = ranks.run(train_stopped, recipe, run, [*OVERRIDES, *engine], evaluation, 0)
    assert stopped == ["stopped", "stopped"]
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert not (run / "evaluation" / "metrics.json").exists()
    assert len(rows(run, "epoch")) == min(evaluation, 4) - 1
    assert ranks.run(train_run, recipe, run, [*OVERRIDES, *engine]) == ["done", "done"]
    if engine:
        assert len(rows(run, "epoch")) == 3
        return
    expected, found = tensors_at(whole, NUM_STEPS), tensors_at(run, NUM_STEPS)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert rows(run, "epoch") == rows(whole, "epoch")
    for name in ("evaluation/metrics.json", "checkpoints/best.json"):
        assert json.loads((run / name).read_text()) == json.loads((whole / name).read_text())


def test_a_stop_during_the_evaluation_of_one_process_keeps_the_epochs_training_loss(
    recipe: Path, tmp_path: Path
) -> None:
    assert train_run(recipe, tmp_path / "whole", OVERRIDES) == "done"
    assert train_stopped(recipe, tmp_path / "run", OVERRIDES, 2, 1) == "stopped"
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    for run in (tmp_path / "run", copy):
        assert train_run(recipe, run, OVERRIDES) == "done"
        assert rows(run, "epoch") == rows(tmp_path / "whole", "epoch")
