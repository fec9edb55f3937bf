"""`mtl verify` knows numbers that are not finite, in checkpoints that are whole to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mtl_dist.checkpoint import (
    Best,
    CheckpointWriter,
    best_checkpoint,
    newest_good,
    steps_in,
    write_checkpoint,
)
from mtl_dist.cli import app
from mtl_dist.errors import UserError
from mtl_dist.not_finite import not_finite_in
from tests.unit.test_checkpoint import make

Tensors = dict[str, dict[str, torch.Tensor]]


def saved(directory: Path, step: int, tensors: Tensors) -> Path:
    written = make(step)
    changed = {file: {**written.tensors.get(file, {}), **of_file} for file, of_file in tensors.items()}
    return write_checkpoint(directory, replace(written, tensors=written.tensors | changed))


def with_one(value: float) -> torch.Tensor:
    tensor = torch.ones(3, 4)
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model/weight", "optimizer/exp_avg/weight", "ema/weight"])
def test_verify_names_every_tensor_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    file, _, tensor = name.partition("/")
    path = saved(tmp_path, 7, {file: {tensor: with_one(value)}})
    (line,) = not_finite_in(path)
    assert line.startswith(f"{path}: expected finite numbers, found NaN or infinity in {name}. ")


def test_verify_ends_with_exit_code_1_and_one_line_for_each_such_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("tasks: {}\n")
    write_checkpoint(tmp_path / "checkpoints", make(1))
    assert CliRunner().invoke(app, ["verify", str(tmp_path)]).exit_code == 0
    weights = {f"layer{number}\x1b.weight": with_one(torch.nan) for number in range(40)}
    saved(tmp_path / "checkpoints", 2, {"model": weights})
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 1 and result.stdout == "step_00000001: good\n"
    assert "step_00000002" in line and "(40 in all)" in line and "\x1b" not in line


def test_what_is_not_finite_on_purpose_is_no_damage(tmp_path: Path) -> None:
    tensors: Tensors = {
        "model": {
            "balancer.initial_losses_T": with_one(torch.nan),
            "backbone.mask": with_one(-torch.inf),
        },
        "metrics": {"value/min": with_one(torch.inf)},
    }
    assert not_finite_in(saved(tmp_path, 1, tensors)) == []
    scales: Tensors = {"model": {"balancer.scales.digit": with_one(torch.nan)}}
    assert len(not_finite_in(saved(tmp_path, 2, scales))) == 1
    positive: Tensors = {"model": {"backbone.running_var": with_one(torch.inf)}}
    assert len(not_finite_in(saved(tmp_path, 3, positive))) == 1


def test_a_checkpoint_that_is_not_finite_is_no_good_one(tmp_path: Path) -> None:
    """Neither to resume from, nor as the best, nor in the place of a good one when older ones are deleted."""
    bad: Tensors = {"model": {"weight": with_one(torch.nan)}}
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.submit(make(1), Best(1, "val/loss", 0.5))
    writer.finish()
    for step in (2, 3):
        saved(tmp_path, step, bad)
    said: list[str] = []
    assert newest_good(tmp_path, said.append) == tmp_path / "step_00000001"
    assert "NaN or infinity in model/weight" in said[0] and "passed over" in said[1]
    (tmp_path / "best.json").write_text('{"step": 3, "metric": "val/loss", "value": 0.1}')
    assert best_checkpoint(tmp_path, said.append) == tmp_path / "step_00000001"
    again = CheckpointWriter(tmp_path, keep_last=2)
    again.submit(make(4), Best(1, "val/loss", 0.5))
    again.finish()
    assert steps_in(tmp_path) == [1, 4]


def test_where_every_checkpoint_is_not_finite_the_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2, {"optimizer": {"exp_avg/weight": with_one(torch.inf)}})
    with pytest.raises(UserError, match="expected a whole checkpoint, found 1 of which none is"):
        newest_good(tmp_path, lambda line: None)
