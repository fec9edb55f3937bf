"""Runs that train in seconds: a small dataset with all kinds of tasks and missing labels, a small network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_dist.checkpoint import read_checkpoint, step_directory

RECIPE = """
tasks:
  digit: {kind: classification, weight: 0.5}
  value: {kind: regression}
  tags: {kind: multilabel}
  shape: {kind: segmentation, loss: {kind: bce_dice}}
data: {train: [{path: DATA}], image_size: 8, augment: standard, workers: 0, shuffle_window: 3}
model: {backbone: simple_cnn, norm: group, head: {hidden: [16], dropout: 0.2}}
optim: {lr: 3.0e-3, clip_norm: 1.0}
train: {epochs: 3, global_batch: 8, log_every: 1, evaluate_at_end: false, keep_last: 100}
"""


def write_recipe(directory: Path, data: Path) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", str(data)))
    return path


def train_run(
    recipe: Path,
    run_dir: Path,
    overrides: Sequence[str] = (),
    dropout: bool = True,
    data_moved: bool = False,
) -> str:
    """Train as `mtl train` does, on this rank; how it ended. Without `dropout` ranks can be compared."""
    from mtl_dist.recipe import load_recipe
    from mtl_dist.runs.train import train

    with pytest.MonkeyPatch.context() as patch:
        if not dropout:
            patch.setattr(torch.nn.functional, "dropout", lambda input, *args, **kwargs: input)
        return train(load_recipe(recipe, overrides), run_dir, data_moved=data_moved).state


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what time decides."""
    dropped = {"kind", "time", "images_per_s", "data_wait"}
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in dropped} for row in found if row["kind"] == kind]


def tensors_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that the checkpoint of `step` holds."""
    checkpoint = read_checkpoint(step_directory(run / "checkpoints", step))
    return {
        f"{file}/{name}": t for file, tensors in checkpoint.tensors.items() for name, t in tensors.items()
    }
