"""On a GPU a recipe trains as on the CPU, under every engine and precision, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

ROOT = Path(__file__).parents[2]
# Without dropout, whose draws differ between devices; with steps so small that a rounding error which turns a
# ReLU on or off does not grow, and that the same weights see each batch: one in another order would be seen.
STEADY = ("model.backbone=shufflenet_v2_x0_5", "model.norm=group", "optim.kind=sgd", "optim.momentum=0")
STEADY += ("optim.lr=1e-5", "optim.schedule.kind=constant", "tasks.thickness.weight=1", "data.workers=2")
STEADY += ("train.global_batch=16", "train.max_steps=20", "train.log_every=1", "train.evaluate_at_end=false")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("digits") / "data"
    run_mtl("prepare", "digits", str(data))
    return data


def run_mtl(*arguments: str, cpu: bool = False) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": str(cpu).lower()}
    command = [sys.executable, "-m", "mtl_dist", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def train(digits: Path, run: Path, *overrides: str, cpu: bool = False) -> list[float]:
    """One process of `mtl train`, as a user starts it: the loss of every step."""
    recipe = str(ROOT / "configs" / "digits.yaml")
    stated = (f"data.train=[{{path: {digits}}}]", *STEADY, *overrides)
    run_mtl("train", recipe, *stated, "--run-dir", str(run), cpu=cpu)
    device = json.loads((run / "environment.json").read_text())[-1]["device"]
    assert device.startswith("cpu" if cpu else "cuda")
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["step/loss"] for row in rows if row["kind"] == "step"]


@cache
def on_cpu(digits: Path, *overrides: str) -> list[float]:
    return train(digits, digits.with_name("-".join(["cpu", *overrides])), *overrides, cpu=True)


@pytest.mark.parametrize(
    "how",
    [
        (),
        ("model.checkpointing=stage",),
        ("model.checkpointing=block",),
        ("train.channels_last=false",),
        ("train.compile=true",),
        ("train.accumulation=2",),
        ("engine.zero_stage=0",),
        ("engine.zero_stage=1",),
        ("engine.zero_stage=2",),
        ("engine.zero_stage=3",),
    ],
    ids=lambda how: " ".join(how) or "plain",
)
def test_a_gpu_trains_as_the_cpu_does(digits: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    assert train(digits, tmp_path / "run", *how) == pytest.approx(on_cpu(digits), rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", [(), ("engine.zero_stage=2",)], ids=["one process", "ZeRO 2"])
def test_low_precisions_are_float32_but_for_their_rounding(
    digits: Path, tmp_path: Path, precision: str, engine: tuple[str, ...]
) -> None:
    found = train(digits, tmp_path / "run", f"train.precision={precision}", *engine)
    assert found == pytest.approx(on_cpu(digits), rel=2e-2)


@pytest.mark.parametrize("method", ["famo", "cagrad", "pcgrad", "graddrop"])
def test_balancing_on_a_gpu_gives_the_losses_of_the_cpu(digits: Path, tmp_path: Path, method: str) -> None:
    how = f"balance.method={method}"
    assert train(digits, tmp_path / "run", how) == pytest.approx(on_cpu(digits, how), rel=1e-3)


def test_a_run_that_stopped_on_the_cpu_goes_on_on_the_gpu(digits: Path, tmp_path: Path) -> None:
    how = ("optim.kind=adamw", "optim.lr=1e-6")
    train(digits, tmp_path / "run", *how, "train.max_steps=10", cpu=True)
    assert train(digits, tmp_path / "run", *how) == pytest.approx(on_cpu(digits, *how), rel=1e-3)
