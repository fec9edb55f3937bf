"""Masks made from the pictures while preparing, and masks whose values have names."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_dist.errors import UserError
from mtl_dist.importers.made_masks import object_by_brightness
from tests.source_files import prepare, prepare_folders


def picture(bright_object: bool, object_side: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    paper, ink = (40, 200) if bright_object else (200, 40)
    pixels = np.full((16, 16, 3), paper)
    pixels[4 : 4 + object_side, 4 : 4 + object_side] = ink
    return (pixels + rng.integers(-10, 10, pixels.shape)).astype(np.uint8)


@pytest.mark.parametrize("bright", [True, False])
def test_the_object_is_what_stands_off_from_the_border(bright: bool) -> None:
    mask = object_by_brightness(picture(bright))
    assert mask[4:12, 4:12].all()
    assert mask.sum() == 64


def test_a_picture_of_one_grey_has_no_object() -> None:
    assert not object_by_brightness(np.full((4, 4, 3), 77, np.uint8)).any()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 1)):
        for name in ("dark", "light"):
            directory = tmp_path / "src" / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = picture(name == "light", 4 + number) // (1 + (split == "val"))
                Image.fromarray(pixels).save(directory / f"{name}{number}.png")
    return tmp_path / "src"


def masks_of(dataset: Path, task: str) -> dict[str, np.ndarray]:
    with tarfile.open(dataset / "train-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(f".{task}.png")]
        return {
            name: np.asarray(Image.open(io.BytesIO(tar.extractfile(name).read())))  # type: ignore[union-attr]
            for name in names
        }


def test_made_masks_are_a_task_of_two_classes(folders: Path, tmp_path: Path) -> None:
    manifest = prepare_folders(folders, tmp_path / "out", "tone", mask={"shape": "otsu"})
    assert manifest.tasks["shape"].classes == ("background", "shape")
    assert manifest.tasks["shape"].num_labelled == 6
    assert "masks of shape were made from the pictures by otsu" in manifest.notes
    masks = masks_of(tmp_path / "out", "shape")
    assert sorted(int(mask.sum()) for mask in masks.values()) == [16, 16, 25, 25, 36, 36]


def test_a_share_of_train_is_held_out_by_class(folders: Path, tmp_path: Path) -> None:
    (folders / "val").rename(folders / "test")
    manifest = prepare_folders(folders, tmp_path / "out", "tone", val=0.34)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 4,
        "val": 2,
        "test": 2,
    }
    assert manifest.splits["val"].labels["tone"].class_counts == (1, 1)


def test_holding_out_is_refused_where_there_is_a_val(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--val: expected data without val, found some"):
        prepare_folders(folders, tmp_path / "out", "tone", val=0.1)


def test_a_function_of_the_users_makes_masks(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_masks.py").write_text(
        "def left(picture):\n    mask = picture[..., 0] < 0\n    mask[:, :8] = True\n    return mask\n\n\n"
        "def wrong(picture):\n    return picture\n"
    )
    prepare_folders(folders, tmp_path / "out", "tone", mask={"left": "my_masks.left"})
    assert all(
        mask[:, :8].all() and mask.sum() == 128 for mask in masks_of(tmp_path / "out", "left").values()
    )
    with pytest.raises(
        UserError, match=r"expected a mask of bool \(16, 16\) from my_masks\.wrong, found uint8"
    ):
        prepare_folders(folders, tmp_path / "bad", "tone", mask={"left": "my_masks.wrong"})
    del sys.modules["my_masks"]


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"shape": "otsou"}, "--mask: expected otsu or the import path of a function"),
        ({"shape": "no_such_module.f"}, "--mask: expected otsu or the import path of a function: expected"),
        ({"tone": "otsu"}, "--mask: expected another name than the task tone"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_made_is_refused(
    masks: dict[str, str], said: str, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        prepare_folders(folders, tmp_path / "out", "tone", mask=masks)
    assert not (tmp_path / "out").exists()


def test_classes_by_value_come_in_the_order_in_which_they_are_stated(tmp_path: Path) -> None:
    """So that a trimap's background, whatever its value, is class 0."""
    for number in range(4):
        Image.fromarray(picture(True)).save(tmp_path / f"{number}.png")
        trimap = np.full((16, 16), 2, np.uint8)
        trimap[3:12, 3:12], trimap[4:11, 4:11] = 3, 1
        trimap[0, 0] = 1 + number % 3
        Image.fromarray(trimap).save(tmp_path / f"{number}_trimap.png")
    rows = [{"file": f"{n}.png", "mask": f"{n}_trimap.png", "split": "train"} for n in range(4)]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    classes = {"animal": {2: "background", 1: "animal", 3: "border"}}
    manifest = prepare(
        tmp_path / "labels.json", tmp_path / "out", segmentation={"animal": "mask"}, classes=classes
    )
    assert manifest.tasks["animal"].classes == ("background", "animal", "border")
    assert all(mask[15, 15] == 0 and mask[7, 7] == 1 and mask[3, 7] == 2
               for mask in masks_of(tmp_path / "out", "animal").values())  # fmt: skip
