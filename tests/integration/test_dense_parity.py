"""Dense tasks under every engine: maps, a grade, numbers and a vector of scenes, some missing; points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mtl_dist.importers.scenes import made_scene
from tests.ranks import RankPool, shared_pool
from tests.tiny_runs import rows, tensors_at, train_run
from tests.tiny_training import whole_up_to

pytestmark = pytest.mark.slow

NUM_STEPS = 2  # of SGD: Adam enlarges rounding where a gradient is nearly 0
SIZE = 32
RECIPE = """
tasks:
  things: {kind: segmentation, loss: {kind: cross_entropy, boundary: {width: 5}}}
  distance: {kind: depth, loss: {kind: huber}}
  surface: {kind: normals}
  light: {kind: regression, loss: {kind: gaussian_nll, floor: 0.5}}
  spread: {kind: regression, space: log, loss: {kind: quantile}}
  colour: {kind: vector, loss: {kind: huber}}
  most: {kind: ordinal}
data:
  train:
    - dataset: {kind: tests.integration.test_dense_parity.Scenes}
      fields:
        things: {kind: segmentation, classes: [background, floor, sphere, box]}
        distance: {kind: depth, unit: m}
        surface: {kind: normals}
        light: {kind: regression}
        spread: {kind: regression}
        colour: {kind: vector, classes: [red, green, blue]}
        most: {kind: ordinal, classes: [floor, sphere, box]}
      index: INDEX
  image_size: 32
  augment: none
  workers: 0
model: {backbone: simple_cnn, norm: group}
optim: {kind: sgd, lr: 0.02, clip_norm: 1.0, schedule: {kind: constant}}
train:
  {epochs: 1, max_steps: 2, checkpoint_every: 1, keep_last: 9, global_batch: 8, log_every: 1,
   evaluate_at_end: false, metrics: false}
"""

POINTS = """
tasks: {light: {kind: regression}, ends: {kind: keypoints}, marks: {kind: keypoints, head: regression}}
data:"""
POINT_FIELDS = """      fields:
        light: {kind: regression}
        ends: {kind: keypoints, classes: [near, far]}
        marks: {kind: keypoints, classes: [left, right, top]}
      index: INDEX
"""


class Scenes(Dataset[Any]):
    """Scenes of which every second lacks a map; a pixel of the background has no depth and no normal."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        scene = made_scene(index, SIZE)
        sample: dict[str, Any] = {
            "image": scene.picture,
            "things": scene.classes,
            "light": float(scene.picture.mean()),
            "spread": float(scene.picture.std()),
            "most": int(np.bincount(scene.classes.ravel(), minlength=4)[1:].argmax()),
            "colour": np.where(np.arange(3) == index % 5, np.nan, scene.picture.mean(axis=(0, 1))),
        }
        sample["distance"] = scene.depth.astype(np.float32)
        sample["surface"] = scene.normals.astype(np.float32)
        where = np.argwhere(np.isfinite(scene.depth))
        if len(where):
            depths = scene.depth[np.isfinite(scene.depth)]
            sample["ends"] = where[[depths.argmin(), depths.argmax()]][:, ::-1].astype(np.float32)
        things = np.argwhere(scene.classes > 1)[:, ::-1]
        if len(things) and index % 3:
            marks = things[[things[:, 0].argmin(), things[:, 0].argmax(), things[:, 1].argmin()]]
            sample["marks"] = np.column_stack([marks, [2, index % 3 - 1, 1]])
        if index % 2:
            del sample[("things", "distance", "surface", "light", "most")[index // 2 % 5]]
        return sample


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    path = directory / "recipe.yaml"
    path.write_text(RECIPE.replace("INDEX", str(directory / "index")))
    return path


@whole_up_to(0)
def train_divided(recipe: Path, run: Path, overrides: Sequence[str]) -> str:
    """Small weights are divided as well."""
    return train_run(recipe, run, overrides, dropout=False)


def alone_on_a_rank(recipe: Path, run: Path, overrides: Sequence[str]) -> str:
    """One process, its sums added as the ranks add them: the solver of cagrad enlarges another rounding."""
    state: str = shared_pool(1).run(train_divided, recipe, run, overrides)[0]
    return state


def assert_same(run: Path, alone: Path) -> None:
    """To rounding after the first step; later a ReLU next to 0 may have taken the other side."""
    assert_near(run, alone, 1, lambda tensor: 2e-5 * tensor.abs().max() + 5e-6)
    assert_near(run, alone, NUM_STEPS, lambda tensor: 0.05 * tensor.abs().max() + 1e-4)
    first, *others = zip(rows(run, "step"), rows(alone, "step"), strict=True)
    assert first[0] == pytest.approx(first[1], rel=1e-5, nan_ok=True)
    for ours, theirs in others:
        assert ours == pytest.approx(theirs, rel=1e-3, nan_ok=True)


def assert_near(run: Path, alone: Path, step: int, most: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found, expected = tensors_at(run, step), tensors_at(alone, step)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.numel():
            # Of a bias before a norm the gradient is rounding alone.
            apart, limit = float((found[name] - tensor).abs().max()), float(most(tensor.float()))
            assert apart <= limit, f"{name} at step {step}: {apart:g}, at most {limit:g}"


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert alone_on_a_rank(recipe, run, []) == "done"
    return run


def rest(*values: object) -> object:
    """One more than it takes for each engine and both numbers of micro-batches to occur."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("engine", "micro_batch"),
    [
        *[("ddp", 2), ("zero1", 4), ("zero2", 2), ("zero3", 4), ("zero3", 2)],
        *[rest("ddp", 4), rest("zero1", 2), rest("zero2", 4)],
    ],
)
def test_dense_tasks_learn_under_every_engine_what_they_learn_alone(
    recipe: Path, alone: Path, ranks: RankPool, tmp_path: Path, engine: str, micro_batch: int
) -> None:
    overrides = [f"train.micro_batch={micro_batch}"]
    if engine != "ddp":
        overrides.append(f"engine.zero_stage={engine[-1]}")
    assert ranks.run(train_divided, recipe, tmp_path / "run", overrides) == ["done", "done"]
    assert_same(tmp_path / "run", alone)


UNET = ["model.timm.arguments={depth: 2}"]
DPT = [
    "model.timm.arguments={depth: 4}",
    "model.decoder={kind: dpt, width: 16, widths: [8, 8, 8, 8], dropout: 0}",
    "model.checkpointing=block",
]


@pytest.mark.parametrize(
    "decoder",
    [
        pytest.param(UNET, id="unet"),
        pytest.param(DPT, id="dpt"),
    ],
)
def test_a_transformer_of_timm_balances_dense_tasks_under_zero_3(
    recipe: Path, ranks: RankPool, tmp_path: Path, decoder: list[str]
) -> None:
    pytest.importorskip("timm")
    if decoder is DPT:
        pytest.importorskip("segmentation_models_pytorch")
    vit = [
        *[f"tasks.{task}=null" for task in ("surface", "spread", "colour", "most")],
        "model.backbone=timm/test_vit",
        "balance={method: cagrad, level: features}",
        *decoder,
    ]
    assert alone_on_a_rank(recipe, tmp_path / "alone", vit) == "done"
    divided = [*vit, "engine.zero_stage=3"]
    assert ranks.run(train_divided, recipe, tmp_path / "run", divided) == ["done", "done"]
    assert_same(tmp_path / "run", tmp_path / "alone")


@pytest.fixture(scope="module")
def points(recipe: Path) -> Path:
    path = recipe.with_name("points.yaml")
    before, after = RECIPE.split("      fields:")
    text = POINTS + before.partition("data:")[2] + POINT_FIELDS + after.partition("      index: INDEX\n")[2]
    path.write_text(text.replace("INDEX", str(recipe.with_name("points"))))
    return path


@pytest.mark.exhaustive  # `make test` has every kind balanced by many methods in test_balancing.py
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2"])
@pytest.mark.parametrize("which", ["recipe", "points"])
def test_balancing_at_the_parameters_weighs_dense_tasks_and_points_on_two_ranks_as_on_one(
    request: pytest.FixtureRequest, ranks: RankPool, tmp_path: Path, which: str, engine: str
) -> None:
    path: Path = request.getfixturevalue(which)
    cagrad = ["balance={method: cagrad, level: parameters}"]
    assert alone_on_a_rank(path, tmp_path / "alone", cagrad) == "done"
    divided = cagrad + ([] if engine == "ddp" else [f"engine.zero_stage={engine[-1]}"])
    assert ranks.run(train_divided, path, tmp_path / "run", divided) == ["done", "done"]
    assert_same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_points_are_learnt_on_two_ranks_as_on_one(
    points: Path, ranks: RankPool, tmp_path: Path, engine: str
) -> None:
    assert alone_on_a_rank(points, tmp_path / "alone", []) == "done"
    overrides = ["train.micro_batch=2"] + ([] if engine == "ddp" else [f"engine.zero_stage={engine[-1]}"])
    assert ranks.run(train_divided, points, tmp_path / "run", overrides) == ["done", "done"]
    assert_same(tmp_path / "run", tmp_path / "alone")
