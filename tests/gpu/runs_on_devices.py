"""Runs of one small recipe on this machine's GPU and on its CPU, to be compared.

With MTL_BENCH_DEVICE=cpu the CPU takes the GPU's place, which tries the tests themselves.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.ranks import shared_pool
from tests.tiny_runs import rows, train_run

ON_CPU = os.environ.get("MTL_BENCH_DEVICE") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda", None if ON_CPU else 0)
AVAILABLE = ON_CPU or torch.cuda.is_available()

# Without dropout, whose draws differ between devices; with steps so small that a rounding error which turns a
# ReLU on or off does not grow, and that the same weights see each batch: one in another order would be seen.
RECIPE = """
tasks:
  digit: {kind: classification}
  value: {kind: regression}
  tags: {kind: multilabel}
  shape: {kind: segmentation, loss: {kind: bce_dice}}
data: {train: [{path: DATA}], image_size: 32, augment: none, workers: 0}
model: {backbone: simple_cnn, norm: group}
optim: {kind: sgd, momentum: 0, lr: 1.0e-5, schedule: {kind: constant}}
engine: {tf32: false}
train: {epochs: 100, max_steps: 8, global_batch: 16, log_every: 1, evaluate_at_end: false}
"""


def losses(recipe: Path, run: Path, *overrides: str) -> list[float]:
    """Train as `mtl train` does, in this process: every task's loss in every step."""
    state = train_run(recipe, run, overrides)
    assert state == "done"
    device = json.loads((run / "environment.json").read_text())[-1]["device"]
    assert device.startswith("cpu" if os.environ.get("ACCELERATE_USE_CPU") == "true" else "cuda"), device
    return losses_in(run)


def losses_in(run: Path) -> list[float]:
    return [
        value
        for row in rows(run, "step")
        for name, value in sorted(row.items())
        if name.startswith("step/") and name.endswith("/loss")
    ]


@cache
def run_on_cpu(recipe: Path, *overrides: str) -> Path:
    """The run folder of a training in a process that sees no GPU."""
    run = recipe.parent / "-".join(["cpu", *(text.replace("/", "_") for text in overrides)])
    shared_pool(1).run(losses, recipe, run, *overrides)
    return run


def losses_on_cpu(recipe: Path, *overrides: str) -> list[float]:
    return losses_in(run_on_cpu(recipe, *overrides))


def metrics_of(run: Path) -> dict[str, Any]:
    """What the evaluation at the end has written."""
    from mtl_dist.run_folder import RunFolder

    return RunFolder(run).read_metrics()
