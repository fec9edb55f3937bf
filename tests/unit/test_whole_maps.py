"""Segmentation is measured at the labels' own size, whatever the model's is: beside an own implementation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_dist.data.loader import Data, eval_loader, open_data
from mtl_dist.data.settings import DataSettings
from mtl_dist.engine.world import World
from mtl_dist.evaluator import Evaluation, evaluate
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.packing import pack
from mtl_dist.prediction.predictor import Predictor
from mtl_dist.tasks.segmentation import SegmentationSettings
from tests.tiny_datasets import png

SIZES = ((13, 17), (9, 31), (13, 17), (13, 17), (8, 8), (21, 5), (11, 11))
UNLABELLED = 3
CLASSES = ("ground", "tree", "water")
WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def masks() -> dict[int, np.ndarray]:
    random = np.random.default_rng(0)
    made = {}
    for number, (height, width) in enumerate(SIZES):
        made[number] = random.choice([0, 1, 2, 255], (height, width), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
    del made[UNLABELLED]
    return made


def write(directory: Path) -> Path:
    made = masks()
    records = [
        Record(
            f"s{number}",
            png(np.full((height, width, 3), 20 * number, np.uint8)),
            {},
            {"land": png(made[number])} if number in made else {},
        )
        for number, (height, width) in enumerate(SIZES)
    ]
    task = TaskSource("segmentation", CLASSES, mask_values={0: 0, 1: 1, 2: 2})
    options = PackOptions(workers=1, shard_samples=3)
    pack({"train": records, "val": records}, directory, {"land": task}, "odd", options=options)
    return directory


def opened(directory: Path, resize: str) -> Data:
    settings = {"train": [{"path": str(directory)}], "image_size": 8, "resize": resize}
    return open_data(DataSettings.model_validate(settings, strict=False), ["land"])


def logits_of(number: int) -> Tensor:
    """What the model says of a sample, at a quarter of the image's size."""
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(number))


class Model:
    """A root module that knows its answers by the picture's brightness."""

    training = False
    term_weights: Mapping[str, float] = {"land": 1.0}
    terms: Mapping[str, tuple[str, ...]] = {"land": ("land",)}
    joints: tuple[Any, ...] = ()

    def __init__(self, data: Data) -> None:
        self.tasks = {"land": SegmentationSettings().build("land", data.task_infos["land"])}

    def eval(self) -> None:
        pass

    def train(self, mode: bool) -> None:
        pass

    def predict(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        numbers = images_BCHW[:, 0, 4, 4].long() // 20
        return {"land": torch.stack([logits_of(number) for number in numbers.tolist()])}

    def loss_sums(self, outputs: Any, batch: Any) -> Tensor:
        return torch.zeros(1)


def evaluated(data: Data, batch_size: int, rank: int = 0, world_size: int = 1) -> Evaluation:
    loader = eval_loader(data, "val", batch_size=batch_size, rank=rank, world_size=world_size, workers=0)
    return evaluate(Model(data), loader, WORLD)  # type: ignore[arg-type]


def enlarged(logits_CHW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, pixel centres aligned, written for itself."""
    for axis, length in ((1, size[0]), (2, size[1])):
        before = logits_CHW.shape[axis]
        at = np.maximum((np.arange(length) + 0.5) * before / length - 0.5, 0)
        low = np.minimum(np.floor(at).astype(int), before - 1)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        above = np.take(logits_CHW, np.minimum(low + 1, before - 1), axis)
        logits_CHW = np.take(logits_CHW, low, axis) * (1 - part) + above * part
    return logits_CHW


def confusion() -> np.ndarray:
    counts = np.zeros((3, 3), int)
    for number, mask in masks().items():
        predicted = enlarged(logits_of(number).double().numpy(), mask.shape).argmax(axis=0)
        for true, said in zip(mask.ravel(), predicted.ravel(), strict=True):
            if true != 255:
                counts[true, said] += 1
    return counts


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_metrics_are_those_of_the_stored_masks_pixel_by_pixel(tmp_path: Path, batch_size: int) -> None:
    found = evaluated(opened(write(tmp_path / "odd"), "stretch"), batch_size)
    counts = confusion()
    assert found.confusion["land"].tolist() == counts.tolist()
    hits, both = counts.diagonal(), counts.sum(axis=0) + counts.sum(axis=1)
    assert found.tasks["land"]["dice"] == pytest.approx(np.mean(2 * hits[1:] / both[1:]))
    assert found.tasks["land"]["iou"] == pytest.approx(np.mean(hits[1:] / (both - hits)[1:]))
    assert found.tasks["land"]["pixel_accuracy"] == pytest.approx(hits.sum() / counts.sum())
    assert found.tasks["land"]["num_samples"] == len(masks())


@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_every_labelled_pixel_is_counted_and_what_predict_shows_is_what_is_measured(
    tmp_path: Path, resize: str
) -> None:
    data = opened(write(tmp_path / "odd"), resize)
    model = Model(data)
    (batch,) = eval_loader(data, "val", batch_size=8, rank=0, world_size=1, workers=0)
    whole = batch.whole["land"]
    outputs = model.predict(batch.images_BCHW)["land"]
    made = masks()
    seen = {}
    for rows, output, maps in whole.beside(outputs, 600):
        for row, one, mask in zip(rows, output, maps, strict=True):
            seen[int(batch.keys[row][1:])] = mask.numpy()
            predictor = SimpleNamespace(
                _network=SimpleNamespace(tasks=model.tasks), _transform=whole.restored.__self__, _boxes=()
            )
            size = (one.shape[1], one.shape[2])
            answer = Predictor._decode_row(predictor, {"land": outputs}, row, size, 0.5)  # type: ignore[arg-type]
            assert np.array_equal(answer["land"]["mask"], one.argmax(dim=0).numpy())
    assert seen.keys() == made.keys()
    assert all(np.array_equal(seen[number], made[number]) for number in made)


def test_two_ranks_count_what_one_counts(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "odd"), "stretch")
    parts = [evaluated(data, 2, rank, 2).confusion["land"] for rank in range(2)]
    assert (parts[0] + parts[1]).tolist() == confusion().tolist()


def test_a_cropped_view_is_measured_as_it_is_shown(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "odd"), "crop")
    (batch,) = eval_loader(data, "val", batch_size=8, rank=0, world_size=1, workers=0)
    assert batch.whole == {}
    valid = (batch.targets["land"] != 255) & batch.labelled["land"][:, None, None]
    assert evaluated(data, 8).confusion["land"].sum() == valid.sum()


def test_training_batches_do_not_carry_whole_maps(tmp_path: Path) -> None:
    from mtl_dist.data.loader import train_loader

    data = opened(write(tmp_path / "odd"), "stretch")
    loader = train_loader(
        data,
        seed=0,
        global_batch=4,
        accumulation=1,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=4,
        workers=0,
        pin_memory=False,
    )
    assert next(iter(loader)).whole == {}
