"""The recipes of digits, CIFAR-100 and cells train on the real data, where it lies beside the repository."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest

from mtl_dist.importers import run
from mtl_dist.importers.idx import read_idx
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.sources import Tree
from mtl_dist.recipe import load_recipe
from tests.source_files import prepare_cifar, prepare_idx, prepare_stacks
from tests.tiny_runs import rows, train_run

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
FAST = PackOptions(workers=1, verify=False)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="the optional real data is not there (../shared/data)"),
]


def some_digits(directory: Path) -> Path:
    """The first 1,200 training and 200 test pictures of MNIST, as IDX files."""
    directory.mkdir()
    tree = Tree(DATA / "mnist")
    for path in tree.files:
        if "idx" in path:
            array = read_idx(tree.source(path))[: 1200 if path.startswith("train") else 200]
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (directory / path).write_bytes(gzip.compress(header + array.tobytes(), 1))
    return directory


def prepare(name: str, out: Path) -> None:
    if name in ("mnist", "strokes"):
        src = some_digits(out.parent / "idx")
        measures = ["thickness", "slant"] if name == "strokes" else []
        if measures:
            pytest.importorskip("skimage", reason="the demo extra is not installed")
        prepare_idx(src, out, "digit", measure=measures, options=FAST)
    elif name == "cifar100":
        prepare_cifar(DATA / "cifar100", out, ["coarse", "fine"], options=FAST)
    elif name == "timelapse":
        prepare_stacks(
            DATA / "timelapse-cells",
            out,
            stacks="stack_*.tif",
            table=Path("frames.csv"),
            regression={"count": "cell_count", "hours": "hours"},
            segmentation={"cell": "mask_*.tif"},
            frames="every:8",
            split={"sw": "val"},
            options=FAST,
        )
    else:
        folder, numbers = ("hsv1-cells", {"hours": "hours_post_infection"})
        if name == "malaria":
            folder, numbers = ("malaria-cells", {})
        settings = {
            "source": DATA / folder / f"{folder}.zip",
            "classification": {"infected": "infected"},
            "classes": {"infected": ["uninfected", "infected"]},
            "regression": numbers,
            "units": dict.fromkeys(numbers, "hours"),
        }
        run("table", out, settings, FAST)


SMALLER = {
    "mnist": [],
    "strokes": [],
    "cifar100": [],
    "cells": ["train.global_batch=4", "data.image_size=64"],
    "timelapse": ["train.global_batch=4", "data.image_size=64"],
    "malaria": ["train.global_batch=16"],
}
"""What makes a step of each recipe affordable for a test."""


@pytest.mark.parametrize("name", SMALLER)
def test_a_recipe_trains_on_its_real_data(name: str, tmp_path: Path) -> None:
    prepare(name, tmp_path / "data")
    overrides = [f"data.train=[{{path: {tmp_path / 'data'}}}]", "data.workers=0", "train.max_steps=3"]
    overrides += ["train.log_every=1", *SMALLER[name]]
    recipe = REPOSITORY / "configs" / f"{name}.yaml"
    assert train_run(recipe, tmp_path / "run", overrides) == "done"
    assert [row["step"] for row in rows(tmp_path / "run", "step")] == [1, 2, 3]
    tasks = set(load_recipe(recipe, overrides).tasks)
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    for split in metrics.values():
        assert set(split) >= tasks
        assert all(split[task]["num_samples"] > 0 for task in tasks)


def test_the_splits_of_the_real_data_share_no_picture(tmp_path: Path) -> None:
    for name in ("cifar100", "cells", "timelapse", "malaria"):
        (tmp_path / name).mkdir()
        prepare(name, tmp_path / name / "data")
        notes = json.loads((tmp_path / name / "data" / "dataset.json").read_text())["notes"]
        assert not [note for note in notes if "the same image" in note], name
