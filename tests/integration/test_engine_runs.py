"""Whole runs (`mtl train`) under DeepSpeed: the metrics of DDP, and a run that changes engines half-way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ranks import RankPool
from tests.tiny_runs import rows, tensors_at, train_run
from tests.tiny_training import whole_up_to

pytestmark = pytest.mark.slow

NUM_STEPS = 12  # 3 epochs of 30 samples, 8 at a time
# A rate that does not know where the run ends, so that it can be run piece by piece.
OVERRIDES = ["train.checkpoint_every=1", "optim.ema=0.9", "optim.schedule={kind: constant}"]


@pytest.fixture(scope="module")
def ddp(recipe: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DDP on two ranks, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("ddp") / "run"
    ranks.run(train_divided, recipe, run, OVERRIDES)
    return run


@whole_up_to(0)
def train_divided(recipe: Path, run: Path, overrides: Sequence[str]) -> str:
    """Without dropout, so that ranks and engines can be compared; small weights are divided as well."""
    return train_run(recipe, run, overrides, dropout=False)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-5 * scale + 2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_run_has_the_figures_of_ddp(
    recipe: Path, ranks: RankPool, ddp: Path, tmp_path: Path, zero_stage: int
) -> None:
    run = tmp_path / "run"
    overrides = [*OVERRIDES, f"engine.zero_stage={zero_stage}", "train.evaluate_at_end=true"]
    assert ranks.run(train_divided, recipe, run, overrides) == ["done", "done"]
    assert_close(tensors_at(run, NUM_STEPS), tensors_at(ddp, NUM_STEPS))
    for kind in ("step", "epoch"):
        for ours, theirs in zip(rows(run, kind), rows(ddp, kind), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    assert (run / "evaluation").is_dir()


def test_a_run_goes_from_ddp_to_zero_3_to_one_process_to_zero_2(
    recipe: Path, ranks: RankPool, ddp: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(ddp, run)
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > 3:
            shutil.rmtree(path)
    for step, pool_size, engine in (
        (6, 2, ["engine.zero_stage=3"]),
        (9, 1, []),
        (12, 2, ["engine.zero_stage=2"]),
    ):
        overrides = [*OVERRIDES, *engine, f"train.max_steps={step}"]
        if pool_size == 1:
            train_divided(recipe, run, overrides)
        else:
            ranks.run(train_divided, recipe, run, overrides)
    assert_close(tensors_at(run, NUM_STEPS), tensors_at(ddp, NUM_STEPS))


def evaluate_under_deepspeed(run: Path, split: str) -> None:
    """As `mtl evaluate` does where the launcher says DeepSpeed."""
    import os

    from mtl_dist.runs.evaluation import evaluate_run

    said = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    os.environ.update(said)
    try:
        evaluate_run(run, split)
    finally:
        for name in said:
            del os.environ[name]


def test_a_run_is_evaluated_alike_under_any_launcher(
    recipe: Path, ranks: RankPool, ddp: Path, tmp_path: Path
) -> None:
    from mtl_dist.run_folder import RunFolder
    from mtl_dist.runs.evaluation import evaluate_run

    metrics = []
    for name in ("alone", "launched"):
        run = tmp_path / name
        shutil.copytree(ddp, run)
        if name == "alone":
            evaluate_run(run, "val")
        else:
            ranks.run(evaluate_under_deepspeed, run, "val")
        metrics.append(RunFolder(run).read_metrics()["val"])
    for task, expected in metrics[0].items():
        assert metrics[1][task] == pytest.approx(expected, rel=1e-5)


def test_fp16_keeps_its_loss_scale_in_the_checkpoint(recipe: Path, ranks: RankPool, tmp_path: Path) -> None:
    from mtl_dist.checkpoint import read_checkpoint, step_directory

    overrides = [*OVERRIDES, "engine.zero_stage=2", "train.precision=fp16"]
    assert ranks.run(train_divided, recipe, tmp_path / "run", overrides) == ["done", "done"]
    checkpoint = read_checkpoint(step_directory(tmp_path / "run" / "checkpoints", NUM_STEPS))
    scaler = checkpoint.state["scaler"]
    assert scaler["scale"] == 2 ** (16 - scaler["num_skipped"])
