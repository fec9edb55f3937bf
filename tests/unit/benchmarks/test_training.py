"""The benchmarks of a step and of a save measure what they say, at sizes that take a second."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.measuring import Laps
from benchmarks.step import matrix_product_flops, step_flops
from benchmarks.training import Scene, build_parts

TINY = Scene("simple_cnn", batch=4, image_size=8)
SIZES = ["--backbone", "simple_cnn", "--batch", "4", "--image-size", "8"]


def lines_of(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_contender_gets_a_row_with_its_speed() -> None:
    output = lines_of(
        "step", *SIZES, "--precision", "fp32", "--with", "contiguous", "--with", "loader",
        "--workers", "0", "--steps", "1", "--repeats", "1",
    )  # fmt: skip
    for name in ("plain PyTorch", "ours", "ours, not channels_last", "ours, with loader"):
        assert re.search(rf"{name} +│ +[\d.,]+ │ +[\d.,]+ │ +[\d.]+ │", output), output
    assert re.search(r"plain PyTorch .*│ +1\.000 │", output)


def test_a_save_is_timed_and_its_size_told() -> None:
    output = lines_of("save", *SIZES, "--every", "2", "--saves", "2")
    assert "2 of them, every 2 steps" in output
    assert re.search(r"one process │ +[\d.]+ │ +[\d.,]+ │ +[\d.,]+ │", output), output


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [("--precision", "fp8", "fp32, bf16"), ("--with", "speed", "contiguous, compiled, loader")],
)
def test_a_misspelt_choice_is_refused(option: str, value: str, choices: str) -> None:
    result = CliRunner().invoke(app, ["step", option, value])
    assert result.exit_code == 2
    assert f"{option}: expected one of {choices}, found '{value}'" in result.output


def test_laps_count_the_steps_after_the_first() -> None:
    laps = Laps(torch.device("cpu"), steps=2)
    for _ in range(3):
        laps(8)
    assert 0 < laps.seconds_per_step < 1


def test_operations_are_those_of_the_layers() -> None:
    device = torch.device("cpu")
    whole = step_flops(TINY, device)
    assert step_flops(replace(TINY, batch=8), device) == 2 * whole
    # Forward: 2 x weights x positions per image; backward: as much again for the weights, and for the inputs
    # of all layers but the first.
    model = build_parts(TINY)[0]
    positions = {"backbone.conv1": 64, "backbone.conv2": 16}
    layers = {
        name: 2 * 4 * module.weight.numel() * positions.get(name, 1)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert whole == 3 * sum(layers.values()) - layers["backbone.conv1"]
    assert matrix_product_flops(torch.device("cpu"), "fp32", size=64) > 1e6
