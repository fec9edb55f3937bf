"""On a GPU a recipe trains as on the CPU, under every engine and precision, and goes on where it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mtl_dist.checkpoint import step_directory
from tests.gpu.runs_on_devices import losses, losses_on_cpu, metrics_of, run_on_cpu
from tests.tiny_runs import rows, tensors_at

DEPTHWISE, RESIDUAL = "model.backbone=shufflenet_v2_x0_5", "model.backbone=resnet18"
STAGE, BLOCK = "model.checkpointing=stage", "model.checkpointing=block"
CONTIGUOUS, COMPILED = "train.channels_last=false", "train.compile=true"
BF16, FP16 = "train.precision=bf16", "train.precision=fp16"
ZERO = [f"engine.zero_stage={stage}" for stage in range(4)]
TWO_MICRO_BATCHES = "train.accumulation=2"


def words(how: object) -> str:
    return " ".join(how) or "plain" if isinstance(how, tuple) else str(how)


def heads_on_the_same_features(balance: str) -> tuple[str, ...]:
    """Without the mask, whose head reads maps; only between these does a method at the features weigh."""
    return ("tasks.shape=null",) if "features" in balance or "graddrop" in balance else ()


@pytest.mark.parametrize(
    "how",
    [
        (),
        (DEPTHWISE,),
        (RESIDUAL, STAGE),
        (DEPTHWISE, BLOCK),
        (DEPTHWISE, CONTIGUOUS),
        (COMPILED,),
        (COMPILED, BLOCK),
        (COMPILED, ZERO[2]),
        ("data.workers=2",),
        (TWO_MICRO_BATCHES,),
        (TWO_MICRO_BATCHES, STAGE, CONTIGUOUS),
        (ZERO[0],),
        (ZERO[1],),
        (ZERO[1], BLOCK, TWO_MICRO_BATCHES),
        (ZERO[2],),
        (ZERO[3],),
        (ZERO[3], STAGE),
        (ZERO[2], "engine.offload_optimizer=true"),
        ("data.blend={mixup: 0.4}", "tasks.shape=null"),
        ("data.blend={cutmix: 1.0}", "tasks.value=null"),
        ("optim.kind=adamw", "optim.lr=1e-6"),
        ("optim.clip_norm=0.1",),
    ],
    ids=words,
)
def test_a_gpu_trains_as_the_cpu_does(recipe: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    # Engines, memory formats and the like do not change what is computed: the CPU takes the plain way.
    same = (*ZERO, STAGE, BLOCK, CONTIGUOUS, COMPILED, "engine.offload_optimizer=true", "data.workers=2")
    plainly = tuple(word for word in how if word not in same)
    assert losses(recipe, tmp_path / "run", *how) == pytest.approx(losses_on_cpu(recipe, *plainly), rel=1e-3)


@pytest.mark.parametrize("precision", [BF16, FP16])
@pytest.mark.parametrize(
    "how",
    [
        (),
        (DEPTHWISE, STAGE, CONTIGUOUS),
        (BLOCK, TWO_MICRO_BATCHES),
        (COMPILED,),
        (ZERO[1], CONTIGUOUS),
        (ZERO[2], STAGE),
        (ZERO[3], TWO_MICRO_BATCHES),
    ],
    ids=words,
)
def test_low_precisions_are_float32_but_for_their_rounding(
    recipe: Path, tmp_path: Path, precision: str, how: tuple[str, ...]
) -> None:
    found = losses(recipe, tmp_path / "run", precision, *how)
    plainly = tuple(word for word in how if word in (DEPTHWISE, TWO_MICRO_BATCHES))
    assert found == pytest.approx(losses_on_cpu(recipe, *plainly), rel=3e-2)


def test_tf32_is_float32_but_for_its_rounding(recipe: Path, tmp_path: Path) -> None:
    found = losses(recipe, tmp_path / "run", "engine.tf32=true")
    assert found == pytest.approx(losses_on_cpu(recipe), rel=5e-3)


@pytest.mark.parametrize("extra", [(), (TWO_MICRO_BATCHES,)], ids=words)
@pytest.mark.parametrize(
    "balance",
    [
        "{method: uncertainty}",
        "{method: famo}",
        "{method: cagrad, level: features}",
        "{method: cagrad, level: parameters}",
        "{method: upgrad, level: features}",
        "{method: pcgrad, level: parameters}",
        "{method: graddrop}",
        "{method: equal, diagnose_every: 2}",
    ],
)
def test_balancing_on_a_gpu_gives_the_losses_of_the_cpu(
    recipe: Path, tmp_path: Path, balance: str, extra: tuple[str, ...]
) -> None:
    how = (f"balance={balance}", *extra, *heads_on_the_same_features(balance))
    assert losses(recipe, tmp_path / "run", *how) == pytest.approx(losses_on_cpu(recipe, *how), rel=1e-3)


@pytest.mark.parametrize(
    "balance", ["{method: cagrad, level: features}", "{method: pcgrad, level: parameters}"]
)
@pytest.mark.parametrize("precision", [BF16, FP16])
def test_balancing_in_low_precision_stays_near_float32(
    recipe: Path, tmp_path: Path, balance: str, precision: str
) -> None:
    how = (f"balance={balance}", *heads_on_the_same_features(balance))
    found = losses(recipe, tmp_path / "run", *how, precision, STAGE)
    assert found == pytest.approx(losses_on_cpu(recipe, *how), rel=3e-2)


def test_the_loss_scale_falls_until_no_gradient_is_infinite(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtl_dist.engine.precision.INITIAL_SCALE", 2.0**30)
    # Small, for a CPU in the GPU's place has no kernels for fp16.
    small = ("data.image_size=16", "train.global_batch=4", "tasks.shape=null", "train.max_steps=24")
    found = losses(recipe, tmp_path / "run", FP16, *small)
    steps = rows(tmp_path / "run", "step")
    assert 0 < steps[-1]["skipped_steps"] < 24
    assert steps[-1]["loss_scale"] == 2.0 ** (30 - steps[-1]["skipped_steps"])
    assert all(loss == loss for loss in found)


def test_the_average_of_weights_and_the_metrics_are_the_cpus(recipe: Path, tmp_path: Path) -> None:
    how = ("optim.ema=0.9", "optim.lr=1e-3", "train.epochs=2", "train.max_steps=null", "train.keep_last=9")
    how += ("train.evaluate_at_end=true",)
    losses(recipe, tmp_path / "run", *how)
    on_cpu = run_on_cpu(recipe, *how)
    found, expected = tensors_at(tmp_path / "run", 8), tensors_at(on_cpu, 8)
    averages = [name for name in expected if name.startswith("ema/")]
    assert averages
    for name in averages:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(on_cpu)
    for split in ("val", "test"):
        for task, metrics in theirs[split].items():
            # A sample whose two best answers are equal but for rounding may fall on either side.
            assert ours[split][task] == pytest.approx(metrics, rel=0.1, abs=0.07, nan_ok=True), (split, task)


def test_a_run_that_stopped_on_the_cpu_goes_on_on_the_gpu(recipe: Path, tmp_path: Path) -> None:
    how = ("optim.kind=adamw", "optim.lr=1e-6")
    shutil.copytree(run_on_cpu(recipe, *how, "train.max_steps=4"), tmp_path / "run")
    assert losses(recipe, tmp_path / "run", *how) == pytest.approx(losses_on_cpu(recipe, *how), rel=1e-3)


@pytest.mark.parametrize("precision", ["train.precision=fp32", BF16, FP16])
@pytest.mark.parametrize("engine", [(), (ZERO[2],)], ids=words)
def test_resuming_on_a_gpu_is_never_having_stopped_bit_for_bit(
    recipe: Path, tmp_path: Path, deterministic: None, precision: str, engine: tuple[str, ...]
) -> None:
    # Resizing a map is the one operation whose backward adds in no fixed order.
    how = (precision, *engine, "tasks.shape=null", "optim.kind=adamw", "optim.lr=1e-3", "optim.ema=0.9")
    how += ("model.head.dropout=0.2", "train.checkpoint_every=1", "train.keep_last=99")
    how += ("balance={method: cagrad, level: features}",)
    losses(recipe, tmp_path / "whole", *how)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in range(5, 9):
        shutil.rmtree(step_directory(tmp_path / "resumed" / "checkpoints", step))
    losses(recipe, tmp_path / "resumed", *how)
    whole, resumed = (tensors_at(tmp_path / name, 8) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])] == []
    assert rows(tmp_path / "resumed", "step") == rows(tmp_path / "whole", "step")
