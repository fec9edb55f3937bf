"""The recipe that README shows trains, as it stands but for a small network and a step."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.packing import pack
from mtl_dist.recipe import load_recipe
from mtl_dist.runs.train import train
from tests.tiny_datasets import png

README = Path(__file__).parents[2] / "README.md"
SMALL = (
    "model.backbone=simple_cnn",
    "data.image_size=32",
    "data.workers=0",
    "train.global_batch=4",
    "train.max_steps=1",
)


def lesions(directory: Path) -> None:
    """What the recipe's tasks want: a diagnosis, a mask, an age."""
    random = np.random.default_rng(0)
    records = {
        split: [
            Record(
                f"{split}{number}",
                png(random.integers(0, 255, (40, 50, 3), np.uint8)),
                {"diagnosis": number % 2, "age": 40.0 + number},
                {"lesion": png(random.integers(0, 2, (40, 50), np.uint8))},
            )
            for number in range(8)
        ]
        for split in ("train", "val")
    }
    tasks = {
        "diagnosis": TaskSource("classification", ("benign", "malignant")),
        "lesion": TaskSource("segmentation", ("background", "lesion"), mask_values={0: 0, 1: 1}),
        "age": TaskSource("regression", unit="years"),
    }
    pack(records, directory, tasks, "skin", options=PackOptions(workers=1))


def test_the_recipe_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    lesions(tmp_path / "data" / "skin")
    outcome = train(load_recipe(yaml.safe_load(block), SMALL), tmp_path / "run")
    assert outcome.state == "done"
    assert (tmp_path / "run" / "evaluation" / "metrics.json").is_file()
