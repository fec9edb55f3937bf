"""Points from a table to a trained model and back: in the pixels of the images as they came."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import mtl_dist
from mtl_dist.errors import UserError
from tests.made_faces import NAMES, write_faces
from tests.source_files import HERE

pytestmark = pytest.mark.slow

RECIPE = """
name: faces
data:
  train: [{{path: {data}}}]
  image_size: [40, 48]
  augment: {{flip: true, rotate: 10, zoom: [0.9, 1.1]}}
  workers: 0
model: {{backbone: simple_cnn}}
tasks: {{face: {{kind: keypoints, reference: [left_eye, right_eye], alpha: 0.1}}}}
optim: {{lr: 0.006}}
train: {{epochs: 10, global_batch: 8, precision: bf16}}
"""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), num=110, side=40)


@pytest.fixture(scope="module")
def run(faces: Path) -> mtl_dist.Run:
    from mtl_dist.importers import run as prepared

    data = faces.parent / "data"
    prepared("table", data, {"source": faces, "labels": {"face": f"keypoints:{','.join(NAMES)}"}}, HERE)
    recipe = faces.parent / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=data))
    return mtl_dist.train(recipe, run_dir=faces.parent / "run")


def test_points_are_learnt_and_come_back_in_pixels_of_the_images(faces: Path, run: mtl_dist.Run) -> None:
    folder = run.path
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())["val"]["face"]
    constant = json.loads((folder / "evaluation" / "baselines.json").read_text())["val"]["face"]
    assert metrics["pck"] > 0.85 > 0.3 > constant["metrics"]["pck"]
    assert metrics["nme"] < 0.1 < constant["metrics"]["nme"]
    assert list(metrics["per_class"]) == list(NAMES)
    predictor = mtl_dist.load(folder)
    apart = []
    for row in list(csv.DictReader(faces.open()))[:60:5]:
        points = predictor.predict(faces.parent / row["file"])["face"]["points"]
        for name in NAMES:
            if row[f"{name}_v"] == "2":
                wanted = [float(row[f"{name}_x"]), float(row[f"{name}_y"])]
                apart.append(np.hypot(points[name]["x"] - wanted[0], points[name]["y"] - wanted[1]))
            assert 0 < points[name]["confidence"] <= 1
    assert np.mean(apart) < 1.5
    rows = list(csv.DictReader((folder / "evaluation" / "val_predictions.csv").open()))
    errors = [float(row["face.pixel_error"]) for row in rows if row["face.pixel_error"]]
    counts = [float(row["face.num_points"]) for row in rows if row["face.pixel_error"]]
    assert np.average(errors, weights=counts) == pytest.approx(metrics["pixel_error"], rel=1e-4)


def test_the_blending_of_points_is_refused_with_the_reason(
    faces: Path, run: mtl_dist.Run, tmp_path: Path
) -> None:
    recipe = faces.parent / "recipe.yaml"
    for how, why in (("mixup", "have no eyes between theirs"), ("cutmix", "hides points and brings its own")):
        with pytest.raises(UserError, match=why):
            mtl_dist.train(recipe, f"data.blend.{how}=0.2", run_dir=tmp_path / "run")


def test_facts_of_a_recipe_are_those_of_its_task(faces: Path, run: mtl_dist.Run, tmp_path: Path) -> None:
    recipe = faces.parent / "recipe.yaml"
    with pytest.raises(UserError, match=r"data.facts.face: .* found 'right_ey'. Did you mean right_eye"):
        mtl_dist.train(
            recipe, {"data.facts.face": {"swap": [["left_eye", "right_ey"]]}}, run_dir=tmp_path / "run"
        )
    with pytest.raises(UserError, match=r"data.facts.fac: expected a task of the training data"):
        mtl_dist.train(recipe, {"data.facts.fac": {"swap": []}}, run_dir=tmp_path / "run")
