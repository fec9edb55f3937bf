"""Small samples read by batch: the same pixels, keys and labels as one by one, and the same judgement."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_dist.batch import Batch
from mtl_dist.data import batches
from mtl_dist.data.libpng import find_libpng
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import ImageDtype, LabelCounts, Manifest, SplitInfo, write_manifest
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.shards import ShardWriter
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo
from tests.tiny_datasets import npy, png

SIDE, COUNT = 9, 21
TASKS = {
    "digit": TaskInfo("classification", classes=("a", "b", "c")),
    "value": TaskInfo("regression", unit="mm"),
    "tags": TaskInfo("multilabel", classes=("p", "q", "r")),
}
rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (COUNT, SIDE, SIDE), np.uint8)
SMOOTH = np.cumsum(GREY // 64, axis=2, dtype=np.uint8)  # PNG encoders choose other filters for it
COLOUR = rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)


def labels_of(number: int) -> dict[str, Any]:
    labels: dict[str, Any] = {"value": number / 4} if number % 2 else {}
    return labels | ({"digit": number % 3, "tags": [number % 3, 1]} if number % 4 else {})


def write(directory: Path, files: list[bytes], channels: int, dtype: ImageDtype = "uint8") -> Path:
    directory.mkdir()
    kinds = {name: info.kind for name, info in TASKS.items()}
    with ShardWriter(directory, "train", kinds, max_samples=4) as writer:
        for number, data in enumerate(files):
            name = f"folder/{number}" if number == 3 else f"{number}"
            writer.write(name.replace("/", "_"), data, "png", labels_of(number), {})
    counts = {
        "digit": LabelCounts(15, 6, (5, 5, 5)),
        "value": LabelCounts(10, 11),
        "tags": LabelCounts(15, 6, (5, 5, 5)),
    }
    split = SplitInfo(len(files), tuple(writer.shards), counts)
    write_manifest(directory, Manifest(channels, dtype, TASKS, {"train": split}, name="small"))
    return directory


def loaded(path: Path, side: int = SIDE, **options: Any) -> list[Batch]:
    stated = {"train": [{"path": str(path)}], "image_size": side, "augment": "none", **options}
    data = open_data(DataSettings.model_validate(stated, strict=False), TASKS)
    return list(
        train_loader(
            data,
            seed=3,
            global_batch=8,
            accumulation=1,
            rank=0,
            world_size=1,
            start_position=0,
            end_position=2 * data.num_train_samples,
            workers=0,
            pin_memory=False,
        )
    )


def one_by_one(path: Path, **options: Any) -> list[Batch]:
    with patch.object(batches, "read_small_images", return_value=None):
        return loaded(path, **options)


def check_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images_BCHW, b.images_BCHW)
        assert a.images_BCHW.stride() == b.images_BCHW.stride()
        assert a.keys == b.keys
        assert torch.equal(a.valid_B, b.valid_B)
        for name in TASKS:
            assert torch.equal(a.targets[name], b.targets[name])
            assert torch.equal(a.labelled[name], b.labelled[name])


def interlaced_or_odd(number: int) -> bytes:
    """Files that must be left to the ordinary decoder, mixed with plain ones."""
    image, buffer = Image.fromarray(COLOUR[number]), io.BytesIO()
    if number % 5 == 0:
        image.convert("P").save(buffer, "PNG")
    elif number % 5 == 1:
        image.convert("RGBA").save(buffer, "PNG")
    elif number % 5 == 2:
        image.save(buffer, "PNG", dpi=(72, 72), pnginfo=None)
    elif number % 5 == 3:
        image.save(buffer, "BMP")
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


FILES: dict[str, tuple[list[bytes], int]] = {
    "grey_png": ([png(image) for image in GREY], 1),
    "smooth_png": ([png(image) for image in SMOOTH], 1),
    "colour_png": ([png(image) for image in COLOUR], 3),
    "grey_png_in_colour": ([png(image) for image in GREY], 3),
    "grey_npy": ([npy(image) for image in GREY], 1),
    "colour_npy": ([npy(image) for image in COLOUR], 3),
    "transposed_npy": ([npy(np.asfortranarray(image)) for image in COLOUR], 3),
    "odd": ([interlaced_or_odd(number) for number in range(COUNT)], 3),
    "other_sizes": ([png(image[: SIDE - n % 2]) for n, image in enumerate(COLOUR)], 3),
}


@pytest.mark.parametrize("kind", FILES)
def test_reading_by_batch_equals_reading_one_by_one(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data", *FILES[kind])
    check_equal(loaded(path), one_by_one(path))


def test_augmented_samples_are_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "data", *FILES["colour_png"])
    check_equal(loaded(path, augment="strong"), one_by_one(path, augment="strong"))
    check_equal(loaded(path, side=5), one_by_one(path, side=5))


@pytest.mark.skipif(find_libpng() is None, reason="no libpng 1.6 library on this machine")
@pytest.mark.parametrize("kind", ["grey_png", "grey_npy", "colour_png"])
def test_plain_small_samples_take_the_short_way(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data", *FILES[kind])
    with patch.object(batches.BatchBuilder, "_fill", side_effect=AssertionError("the long way")):
        assert sum(len(batch) for batch in loaded(path)) == 2 * COUNT + -2 * COUNT % 8


@pytest.mark.parametrize("kind", ["grey_png", "grey_npy"])
@pytest.mark.parametrize("skip", [False, True])
def test_damage_is_told_as_one_by_one(kind: str, skip: bool, tmp_path: Path) -> None:
    """Whatever byte of a file is damaged, both ways show the same pixels, or say the same."""
    files, channels = FILES[kind]
    options: dict[str, Any] = {"on_bad_sample": {"kind": "skip", "max_fraction": 0.9}} if skip else {}
    for number in range(12):
        damaged = bytearray(files[5])
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        bad = [*files[:5], bytes(damaged[: len(damaged) - (number % 3)]), *files[6:]]
        path = write(tmp_path / f"{kind}{skip}{number}", bad, channels)
        try:
            expected = one_by_one(path, **options)
        except UserError as error:
            with pytest.raises(UserError) as found:
                loaded(path, **options)
            assert _without_addresses(found.value) == _without_addresses(error)
        else:
            check_equal(loaded(path, **options), expected)


def _without_addresses(error: UserError) -> str:
    return re.sub("0x[0-9a-f]+", "", str(error))


def test_a_shard_that_was_cut_off_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "data", *FILES["grey_npy"])
    stated = {"train": [{"path": str(path)}], "image_size": SIDE, "augment": "none"}
    data = open_data(DataSettings.model_validate(stated, strict=False), TASKS)
    shard = path / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    batches_of = train_loader(
        data, seed=3, global_batch=8, accumulation=1, rank=0, world_size=1, start_position=0,
        end_position=COUNT, workers=0, pin_memory=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="its shard ends"):
        list(batches_of)
