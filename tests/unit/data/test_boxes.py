"""Boxes move with their image and masks, as torchvision moves them, and vanish where nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from mtl_dist.data.boxes import box_of, check_boxes, edges_in, shown_box
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import LabelCounts, Manifest, SplitInfo, write_manifest
from mtl_dist.data.pictures import Box, DecodedPicture
from mtl_dist.data.rand_augment import RandAugmentSettings
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.shards import ShardWriter
from mtl_dist.data.transforms import PRESETS, AugmentSettings, CentreCrop, Transform
from mtl_dist.errors import UserError
from mtl_dist.randomness import Draws
from mtl_dist.specs import TaskInfo
from tests.tiny_datasets import npy

HEIGHT, WIDTH = 60, 80
EDGES = ("x0", "y0", "x1", "y1")
BOXES = {"thing": list(EDGES)}


def rectangle(edges: list[int]) -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    mask[edges[1] : edges[3], edges[0] : edges[2]] = 1
    return mask


def around(mask: torch.Tensor) -> list[float] | None:
    rows, columns = np.nonzero(mask.numpy() == 1)
    if not len(rows):
        return None
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


boxes = st.tuples(
    st.integers(0, WIDTH - 12), st.integers(0, HEIGHT - 12), st.integers(10, 60), st.integers(10, 50)
).map(lambda b: [b[0], b[1], min(b[0] + b[2], WIDTH), min(b[1] + b[3], HEIGHT)])
upright = AugmentSettings(
    crop_scale=(0.3, 1.0), flip=True, flip_vertical=True, translate=0.1, zoom=(0.8, 1.2)
)
turned = AugmentSettings(crop_scale=(0.5, 1.0), flip=True, rotate=40, rand_augment=RandAugmentSettings())


@settings(max_examples=80, deadline=None)
@given(
    edges=boxes,
    key=st.integers(0, 10_000),
    resize=st.sampled_from(["stretch", "crop", "pad", CentreCrop(crop_fraction=0.75)]),
    augment=st.sampled_from([PRESETS["none"], PRESETS["standard"], upright]),
)
def test_a_box_lies_around_its_object_in_every_view(
    edges: list[int], key: int, resize: Any, augment: AugmentSettings
) -> None:
    transform = Transform((96, 72), resize, augment)
    mask = rectangle(edges)
    _, masks, seen = transform.view_with_boxes(
        DecodedPicture(mask[None].expand(3, -1, -1)), {"mask": mask}, {"thing": edges}, Draws(key)
    )
    found = around(masks["mask"])
    if "thing" in seen and found is not None:
        assert np.abs(np.array(seen["thing"]) - found).max() <= 2.1
    else:  # at most a sliver
        assert found is None or min(found[2] - found[0], found[3] - found[1]) <= 2


@settings(max_examples=60, deadline=None)
@given(edges=boxes, key=st.integers(0, 10_000))
def test_a_turned_box_holds_all_of_its_object(edges: list[int], key: int) -> None:
    mask = rectangle(edges)
    _, masks, seen = Transform((72, 96), "stretch", turned).view_with_boxes(
        DecodedPicture(mask[None].expand(3, -1, -1)), {"mask": mask}, {"thing": edges}, Draws(key)
    )
    found = around(masks["mask"])
    assume(found is not None and found[2] - found[0] > 3 and found[3] - found[1] > 3)
    assert found is not None
    left, top, right, bottom = seen["thing"]
    assert left <= found[0] + 2 and top <= found[1] + 2 and right >= found[2] - 2 and bottom >= found[3] - 2


@given(
    edges=boxes,
    top=st.integers(0, 20),
    left=st.integers(0, 30),
    height=st.integers(20, 40),
    width=st.integers(20, 50),
)
def test_a_crop_moves_a_box_as_torchvision_does(
    edges: list[int], top: int, left: int, height: int, width: int
) -> None:
    theirs = tv_tensors.BoundingBoxes(
        torch.tensor([edges], dtype=torch.float32), format="XYXY", canvas_size=(HEIGHT, WIDTH)
    )
    expected = vision.resized_crop(theirs, top, left, height, width, [96, 72])
    ours = shown_box(box_of(edges, (HEIGHT, WIDTH)), Box(top, left, height, width), (96, 72))
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    torch.testing.assert_close(
        vision.horizontal_flip(ours).as_subclass(torch.Tensor),
        vision.horizontal_flip(expected).as_subclass(torch.Tensor),
    )


@pytest.mark.parametrize("edges", [[3, 4, 3.5, 20], [20, 5, 10, 9], [100, 5, 120, 9], [-9, 5, 0.5, 9]])
def test_less_than_a_pixel_is_no_box(edges: list[float]) -> None:
    assert edges_in(box_of(edges, (HEIGHT, WIDTH)), (HEIGHT, WIDTH)) is None


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad", CentreCrop(short_side=100)])
def test_a_predicted_box_goes_back_to_where_it_was(resize: Any) -> None:
    transform = Transform((48, 96), resize, PRESETS["none"])
    edges = [30.0, 25.0, 50.0, 35.0]
    picture = DecodedPicture(torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8))
    _, _, seen = transform.view_with_boxes(picture, {}, {"thing": edges}, Draws(0))
    assert transform.restored_box(seen["thing"], (HEIGHT, WIDTH)) == pytest.approx(edges, abs=1e-3)


# ---------------------------------------------------------------- in a batch
@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample i has its box at (5 i, 4 i); the third lacks an edge, the fourth the whole box."""
    directory = tmp_path_factory.mktemp("data") / "boxed"
    directory.mkdir()
    with ShardWriter(directory, "train", dict.fromkeys(EDGES, "regression")) as writer:
        for i in range(6):
            edges = [5 * i, 4 * i, 5 * i + 20, 4 * i + 16]
            labels = {} if i == 3 else dict(zip(EDGES[: 3 if i == 2 else 4], map(float, edges), strict=False))
            image = np.repeat(rectangle(edges).numpy()[..., None] * 200, 3, axis=-1)
            writer.write(f"sample{i}", npy(image), "npy", labels, {})  # type: ignore[arg-type]
    task_infos = {name: TaskInfo("regression", num_labelled=5, mean=20, std=9) for name in EDGES}
    counts = dict.fromkeys(EDGES, LabelCounts(5, 1))
    splits = {"train": SplitInfo(6, tuple(writer.shards), counts)}
    write_manifest(directory, Manifest(3, "uint8", task_infos, splits))
    return directory


def batch_of(dataset: Path, **options: Any) -> Any:
    stated = {
        "train": [{"path": str(dataset)}],
        "image_size": [HEIGHT, WIDTH],
        "augment": "none",
        "boxes": BOXES,
    }
    data = open_data(DataSettings.model_validate({**stated, **options}, strict=False), EDGES)
    (batch,) = train_loader(
        data, seed=1, global_batch=6, accumulation=1, rank=0, world_size=1, start_position=0, end_position=6,
        workers=0, pin_memory=False,
    )  # fmt: skip
    return batch


def test_a_batch_holds_the_boxes_of_the_images_as_they_are_seen(dataset: Path) -> None:
    for options in ({"image_size": [30, 160]}, {"augment": {"flip": True, "crop_scale": [0.2, 1.0]}}):
        batch = batch_of(dataset, **options)
        seen = 0
        for i, key in enumerate(batch.keys):
            labelled = {bool(batch.labelled[name][i]) for name in EDGES}
            assert len(labelled) == 1
            found = around((batch.images_BCHW[i, 0] > 100).to(torch.uint8))
            if key in ("sample2", "sample3"):
                assert labelled == {False}
            elif labelled == {True}:
                seen += 1
                edges = [float(batch.targets[name][i]) for name in EDGES]
                assert found is not None and np.abs(np.array(edges) - found).max() <= 2.1
            else:
                assert found is None or min(found[2] - found[0], found[3] - found[1]) <= 2
        assert seen >= 2


def test_boxes_are_standardised_by_the_image_that_is_seen(dataset: Path) -> None:
    stated = {"train": [{"path": str(dataset)}], "image_size": [30, 160], "boxes": BOXES}
    data = open_data(DataSettings.model_validate(stated, strict=False), EDGES)
    assert [data.task_infos[name].mean for name in EDGES] == [80, 15, 80, 15]
    assert [data.task_infos[name].std for name in EDGES] == [40, 7.5, 40, 7.5]
    assert data.task_infos["x0"].num_labelled == 5


def test_what_is_not_moved_stays_as_it_is(dataset: Path) -> None:
    batch = batch_of(dataset)
    for i, key in enumerate(batch.keys):
        number = int(key[-1])
        if number not in (2, 3):
            edges = [float(batch.targets[name][i]) for name in EDGES]
            assert edges == [5 * number, 4 * number, 5 * number + 20, 4 * number + 16]


# ---------------------------------------------------------------- what is refused
NUMBERS = {name: TaskInfo("regression") for name in EDGES}


@pytest.mark.parametrize(
    ("boxes", "mixup", "message"),
    [
        (
            {"thing": ("x0", "y0", "x1", "breed")},
            False,
            r"expected regression tasks, found breed \(classification\)",
        ),
        ({"thing": ("x0", "y0", "x1", "nose")}, False, r"found nose \(no task of the recipe\)"),
        ({"x0": EDGES}, False, "data.boxes.x0: expected a name of its own"),
        (
            {"thing": EDGES, "other": EDGES},
            False,
            "data.boxes.other: expected each task once, found x0 in thing",
        ),
        ({"thing": EDGES}, True, "data.blend.mixup: expected no boxes"),
    ],
)
def test_mistakes_are_reported(boxes: dict[str, Any], mixup: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_boxes(boxes, NUMBERS | {"breed": TaskInfo("classification")}, mixup)
