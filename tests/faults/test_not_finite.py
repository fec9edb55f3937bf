"""One NaN pixel, or one infinite loss: the step is skipped whole by all ranks, counted and named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mtl_dist.batch import Batch
from mtl_dist.checkpoint import read_checkpoint, step_directory
from mtl_dist.errors import UserError
from mtl_dist.monitor import Monitor, MonitorSettings
from mtl_dist.optim import ConstantSchedule
from mtl_dist.runs import train as run_training
from mtl_dist.skipping import KeptBuffers
from mtl_dist.step import RootModule
from tests.ranks import RankPool
from tests.tiny_runs import rows, tensors_at, train_run
from tests.tiny_training import whole_up_to

Fault = Literal["pixel", "loss"]

BAD_STEP = 2  # counted from 0: it leads from the checkpoint of step 2 to that of step 3
GLOBAL_BATCH = 8
BAD_POSITION = BAD_STEP * GLOBAL_BATCH + 5  # on two ranks it lies on the second
OVERRIDES = ("train.checkpoint_every=1", "train.max_steps=5", "model.norm=batch", "optim.ema=0.9")


@contextmanager
def injected(fault: Fault, steps: Sequence[int] = (BAD_STEP,)) -> Iterator[None]:
    """Inside, a pixel of one sample of these steps is NaN, or the loss of `digit` infinite on one rank."""
    positions = [step * GLOBAL_BATCH + 5 for step in steps]
    train_loader, losses = run_training.train_loader, RootModule.losses

    def with_nan(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in train_loader(*args, **kwargs):
            hit_B = torch.isin(batch.positions_B, torch.tensor(positions))
            if hit_B.any():
                images = batch.images_BCHW.float()
                images[hit_B, 0, 0, 0] = torch.nan
                batch = replace(batch, images_BCHW=images)
            yield batch

    def with_infinity(root: RootModule, features: Any, batch: Batch, totals: Any) -> Any:
        losses_T, sums_T, outputs = losses(root, features, batch, totals)
        if totals.step in steps and torch.isin(batch.positions_B, torch.tensor(positions)).any():
            infinite_T = torch.tensor([torch.inf, 0, 0, 0])
            return losses_T + infinite_T, sums_T + infinite_T, outputs
        return losses_T, sums_T, outputs

    with pytest.MonkeyPatch.context() as patch:
        if fault == "pixel":
            patch.setattr(run_training, "train_loader", with_nan)
        else:
            patch.setattr(RootModule, "losses", with_infinity)
        yield


@whole_up_to(0)
def train_with(
    fault: Fault, recipe: Path, run: Path, overrides: Sequence[str], steps: Sequence[int] = (BAD_STEP,)
) -> str:
    """Run on every rank; how it ended, or the message of the mistake."""
    with injected(fault, steps):
        try:
            return train_run(recipe, run, overrides)
        except UserError as error:
            return str(error)


def state_at(run: Path, step: int) -> dict[str, Any]:
    return read_checkpoint(step_directory(run / "checkpoints", step)).state


def counted_at(run: Path, step: int) -> dict[str, Any]:
    """What the training metrics have counted of the epoch."""
    tensors = read_checkpoint(step_directory(run / "checkpoints", step)).tensors["metrics"]
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def assert_skipped_whole(run: Path, fault: Fault) -> None:
    """The step changed nothing but the count of steps, and its samples are named."""
    before, after = tensors_at(run, BAD_STEP), tensors_at(run, BAD_STEP + 1)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    for name in ("epoch_sums", "epoch_counts", "monitor", "scaler"):
        assert state_at(run, BAD_STEP)[name] == state_at(run, BAD_STEP + 1)[name]
    counted = repr(counted_at(run, BAD_STEP))
    assert counted == repr(counted_at(run, BAD_STEP + 1)) != repr(counted_at(run, BAD_STEP - 1))
    assert state_at(run, 5)["skipped"] == {"num_skipped": 1, "recent": [BAD_STEP + 1]}
    last = tensors_at(run, 5)
    sentinels = [name for name in last if "/balancer." in name]
    assert [name for name, t in last.items() if not t.isfinite().all() and name not in sentinels] == []

    skipped = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [BAD_STEP + 1]
    assert len(skipped[0]["keys"]) == GLOBAL_BATCH
    if fault == "pixel":
        assert len(skipped[0]["images"]) == 1 and skipped[0]["images"][0] in skipped[0]["keys"]
    else:
        assert skipped[0]["tasks"] == ["digit"] and skipped[0]["images"] == []
    log = (run / "log.txt").read_text()
    assert f"step {BAD_STEP + 1} was skipped" in log and skipped[0]["keys"][0][:6] in log
    steps = rows(run, "step")
    if steps[0].get("loss_scale") is None:
        assert [row["skipped_steps"] for row in steps] == [0, 0, 1, 1, 1]
        assert any(not torch.equal(tensor, last[name]) for name, tensor in before.items())
    assert "step/loss" not in steps[BAD_STEP] and steps[BAD_STEP + 1]["step/loss"] > 0


@pytest.mark.parametrize(
    ("fault", "precision", "balance", "accumulation"),
    [
        ("pixel", "fp32", "uncertainty", 1),
        ("loss", "bf16", "famo", 2),
        ("pixel", "fp16", "cagrad", 1),
        ("loss", "fp16", "db-mtl", 1),
        ("pixel", "bf16", "gradnorm", 2),
        ("loss", "fp32", "dwa", 1),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_whole(
    recipe: Path, tmp_path: Path, fault: Fault, precision: str, balance: str, accumulation: int
) -> None:
    overrides = [
        *OVERRIDES,
        f"train.precision={precision}",
        f"train.accumulation={accumulation}",
        f"balance.method={balance}",
        *(["tasks.digit.weight=1"] if balance != "fixed" else []),
    ]
    assert train_with(fault, recipe, tmp_path / "run", overrides) == "done"
    assert_skipped_whole(tmp_path / "run", fault)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "precision", "engine"),
    [
        ("pixel", "fp32", "kind=accelerate"),
        ("loss", "fp16", "kind=accelerate"),
        ("loss", "bf16", "zero_stage=0"),
        ("pixel", "bf16", "zero_stage=1"),
        ("loss", "fp32", "zero_stage=2"),
        ("pixel", "fp16", "zero_stage=3"),
    ],
)
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(
    recipe: Path, ranks: RankPool, tmp_path: Path, fault: Fault, precision: str, engine: str
) -> None:
    overrides = [*OVERRIDES, f"train.precision={precision}", f"engine.{engine}"]
    assert ranks.run(train_with, fault, recipe, tmp_path / "run", overrides) == ["done", "done"]
    assert_skipped_whole(tmp_path / "run", fault)


def test_too_many_skipped_steps_end_the_run_with_its_last_good_state(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    message = train_with("loss", recipe, run, [*OVERRIDES, "train.max_bad_steps=1"], steps=(2, 3, 4))
    assert "train.max_bad_steps: expected at most 1 of 100 steps" in message
    assert "found 2, the last one at step 4" in message
    assert all(tensor.isfinite().all() for tensor in tensors_at(run, 3).values())
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    # Resumed past the samples that were bad, it counts on and ends well.
    assert train_run(recipe, run, [*OVERRIDES, "train.max_bad_steps=1"]) == "done"
    assert state_at(run, 5)["skipped"]["num_skipped"] == 1


def test_a_window_of_which_nothing_is_finite_from_the_start_leaves_no_trace(
    recipe: Path, tmp_path: Path
) -> None:
    """What takes its size in the first window (the averages of db-mtl) is without one again."""
    overrides = [*OVERRIDES, "balance.method=db-mtl", "tasks.digit.weight=1", "train.log_every=1"]
    assert train_with("loss", recipe, tmp_path / "run", overrides, steps=(0,)) == "done"
    assert all(t.isfinite().all() for t in tensors_at(tmp_path / "run", 5).values())
    assert state_at(tmp_path / "run", 1)["epoch_counts"] == [0, 0, 0, 0]


# ---------------------------------------------------------------- what a GPU selects without its host
def test_buffers_are_put_back_where_the_step_was_not_finite() -> None:
    norm = torch.nn.BatchNorm1d(2)
    kept = KeptBuffers(norm)
    norm(torch.randn(4, 2))
    kept.keep()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.full((4, 2), torch.nan))
    kept.restore_unless(torch.tensor(False))
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    norm(torch.randn(4, 2))
    kept.restore_unless(torch.tensor(True))
    assert not torch.equal(norm.running_mean, before["running_mean"])


def test_a_fused_optimizer_told_of_infinity_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(2):
        parameter.grad = torch.ones(3)
        optimizer.step()
    before = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    parameter.grad = torch.full((3,), torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in optimizer.state[parameter].items())


def test_an_evaluation_that_is_not_finite_is_never_the_best() -> None:
    monitor = Monitor(MonitorSettings(), "max", ConstantSchedule())
    assert not monitor.observe(float("inf")) and not monitor.observe(float("nan"))
    assert monitor.observe(0.5) and monitor.state.best == 0.5
