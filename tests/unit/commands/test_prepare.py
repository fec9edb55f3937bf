"""`mtl prepare idx`, `cifar` and `stacks` as they are typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from mtl_dist.cli import app
from mtl_dist.data.manifest import read_manifest
from tests.source_files import fill
from tests.unit.importers.test_arrays import cifar_files, idx_files
from tests.unit.importers.test_stacks import frames_of, write_stacks


def mtl(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_idx_files_with_names_and_a_share_to_validate_on(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", idx_files())
    said = mtl(
        "prepare", "idx", src, tmp_path / "out", "--task", "digit", "--classes", "a, b,c", "--val", "0.25"
    )
    assert "digit (classification)" in said
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tasks["digit"].classes == ("a", "b", "c")
    assert manifest.splits["val"].num_samples == 10


def test_cifar_records_with_two_heads(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cifar_files())
    mtl("prepare", "cifar", src, tmp_path / "out", "--heads", "coarse,fine", "--classes", "fine=w,x,y,z")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tasks["coarse"].classes == ("land", "sea")
    assert manifest.tasks["fine"].classes == ("w", "x", "y", "z")


def test_stacks_with_table_masks_and_splits(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    mtl(
        *("prepare", "stacks", src, tmp_path / "out", "--stacks", "stack_*.tif", "--table", "frames.csv"),
        *("--regression", "count=count", "--segmentation", "cell=mask_*.tif", "--split", "val=b;test=c"),
        *(
            "--compute",
            "hours=page * 0.5",
            "--regression",
            "hours=hours",
            "--frames",
            "every:2",
            "--normalise",
            "1,99",
        ),
    )
    manifest = read_manifest(tmp_path / "out")
    assert {name: info.kind for name, info in manifest.tasks.items()} == {
        "count": "regression",
        "hours": "regression",
        "cell": "segmentation",
    }
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 3,
        "val": 3,
        "test": 3,
    }


def test_stacks_in_class_folders_with_a_number_that_depends_on_the_class(tmp_path: Path) -> None:
    for number, name in enumerate(("infected/x", "uninfected/y", "infected/z", "uninfected/w")):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / "src" / f"{name}.tif", frames_of(number))
    mtl(
        *("prepare", "stacks", tmp_path / "src", tmp_path / "out", "--classification", "infected=folder"),
        *("--classes", "infected=uninfected,infected", "--split", "0.5,0.5"),
        *(
            "--compute",
            "hours=page * 0.5 - 1 if folder == 'infected' else None",
            "--regression",
            "hours=hours",
        ),
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tasks["infected"].class_counts == (6, 6)
    assert manifest.tasks["hours"].num_labelled == 6
    assert (manifest.tasks["hours"].minimum, manifest.tasks["hours"].maximum) == (-1.0, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regression", "n=page", "--compute", "page=1"], "expected a new column, found one of this name"),
        (["--regression", "n=n", "--compute", "n=pgae * 2"], "expected one of the columns"),
        (["--regression", "n=page", "--normalise", "99,1"], "--normalise: expected two percentiles"),
        (["--regression", "n=page", "--split", "val="], "--split: expected SPLIT=GROUP,..."),
        (["--regression", "count"], "--regression: expected TASK=COLUMN"),
    ],
)
def test_a_mistake_in_an_option_of_stacks_is_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((5, 8, 9), np.uint8))
    assert message in refused("prepare", "stacks", tmp_path, tmp_path / "out", *arguments)
