"""What a kind has to know of its labels is said where they are prepared, or in the recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mtl_dist.cli import app
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.settings import DataSettings, SourceSettings
from mtl_dist.data.task_infos import tasks_in
from mtl_dist.errors import UserError

MILLIMETRES = np.array([[0, 500], [1500, 60000]], np.uint16)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["file,depth,split"]
    for number, split in enumerate(("train", "train", "val")):
        Image.fromarray(np.full((2, 2, 3), 50 * number + 9, np.uint8)).save(tmp_path / f"{number}.png")
        Image.fromarray(MILLIMETRES + number).save(tmp_path / f"depth{number}.png")
        lines.append(f"{number}.png,depth{number}.png,{split}")
    (tmp_path / "rooms.csv").write_text("\n".join(lines))
    return tmp_path / "rooms.csv"


def prepared(table: Path, *more: str) -> str:
    words = ["prepare", "table", str(table), str(table.parent / "out"), "--depth", "depth=depth", *more]
    result = CliRunner().invoke(app, words)
    return result.output + str(result.exception or "")


def test_a_png_of_16_bits_has_its_scale_and_range(table: Path) -> None:
    prepared(table, "--unit", "depth=m", "--facts", "depth=scale: 0.001, range: [0.1, 10]")
    info = read_manifest(table.parent / "out").tasks["depth"]
    assert info.facts["scale"] == 0.001 and info.facts["pixels"] == 4  # 0 says "no value", 1 mm is too near
    assert (info.unit, info.minimum, info.maximum) == ("m", pytest.approx(0.5), pytest.approx(1.501))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("depht=scale: 1", "--facts: expected one of the tasks depth, found 'depht'"),
        ("depth=scal: 1", "--facts depth: facts of a depth task: expected scale, invalid, range, metric"),
        ("depth=0.001", "--facts depth: expected KEY: VALUE, ... (scale: 0.001), found '0.001'"),
        ("depth=scale: [", "--facts depth: expected KEY: VALUE, ... (scale: 0.001)"),
    ],
)
def test_facts_that_mean_nothing_are_refused_before_anything_is_read(
    table: Path, facts: str, message: str
) -> None:
    assert message in " ".join(prepared(table, "--facts", facts).split())


def test_a_recipe_states_another_scale_but_not_which_numbers_are_values(table: Path) -> None:
    prepared(table)

    def stated(**facts: object) -> DataSettings:
        source = SourceSettings(path=str(table.parent / "out"))
        return DataSettings(train=(source,), image_size=(2, 2), facts={"depth": facts})

    info = tasks_in(stated(scale=0.001))["depth"]
    assert info.maximum == pytest.approx(60.001) and info.facts["scale"] == 0.001
    with pytest.raises(UserError, match=r"data\.facts\.depth: expected invalid and range as they were"):
        tasks_in(stated(range=[0, 10]))
