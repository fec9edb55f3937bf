"""A trained run as a predictor: every form of an image, and overlays of odd files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtl_dist
from mtl_dist.errors import UserError
from mtl_dist.predictor import predict_files
from tests.tiny_datasets import HEIGHT, WIDTH, image_of
from tests.tiny_runs import train_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    train_run(recipe, directory / "run", ["train.max_steps=2"])
    return directory / "run"


def test_an_answer_holds_what_each_kind_of_task_promises(run: Path) -> None:
    answer = mtl_dist.load(run).predict(image_of(5))
    assert set(answer) == {"digit", "value", "tags", "shape"}
    assert set(answer["digit"]) == {"class_id", "class_name", "confidence", "probabilities"}
    assert answer["digit"]["confidence"] == max(answer["digit"]["probabilities"].values())
    assert set(answer["value"]) == {"value", "unit"}
    assert set(answer["tags"]) == {"labels", "probabilities"}
    shape = answer["shape"]
    assert set(shape) == {"mask", "area_ratio", "probability"}
    assert shape["mask"].shape == shape["probability"].shape == (HEIGHT, WIDTH)
    assert np.array_equal(shape["mask"] > 0, shape["probability"] > 0.5)
    assert shape["area_ratio"] == pytest.approx(float((shape["mask"] > 0).mean()))


def test_the_threshold_decides_what_is_foreground_and_which_labels_hold(run: Path) -> None:
    predictor = mtl_dist.load(run)
    answer = predictor.predict(image_of(5))
    middle = float(np.median(answer["shape"]["probability"]))
    other = predictor.predict(image_of(5), threshold=middle)
    assert np.array_equal(other["shape"]["mask"] > 0, other["shape"]["probability"] > middle)
    for threshold in (0.0, 1.0):
        with pytest.raises(UserError, match="threshold: expected a probability between 0 and 1"):
            predictor.predict(image_of(5), threshold=threshold)


def test_a_batch_answers_as_its_images_do_one_by_one(run: Path) -> None:
    predictor = mtl_dist.load(run)
    pictures = [image_of(number) for number in range(40)]
    singly = [predictor.predict(picture) for picture in pictures]
    stacked = np.stack(pictures)
    as_tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    for batch in (pictures, [Image.fromarray(picture) for picture in pictures], stacked, as_tensor):
        for one, other in zip(singly, predictor.predict_many(batch), strict=True):
            assert other["value"]["value"] == pytest.approx(one["value"]["value"], rel=1e-4)
            assert np.allclose(other["shape"]["probability"], one["shape"]["probability"], atol=1e-4)


def test_an_opened_image_answers_as_its_file_does(run: Path, tmp_path: Path) -> None:
    predictor = mtl_dist.load(run)
    for name, mode, orientation in (
        ("turned.jpg", "RGB", 6),
        ("print.jpg", "CMYK", 1),
        ("video.jpg", "YCbCr", 1),
    ):
        picture = Image.fromarray(image_of(5)).convert(mode)
        exif = picture.getexif()
        exif[0x112] = orientation
        picture.save(tmp_path / name, exif=exif)
        from_file = predictor.predict(tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            answer = predictor.predict(opened)
        assert answer["digit"]["probabilities"] == from_file["digit"]["probabilities"], name
        assert np.array_equal(answer["shape"]["probability"], from_file["shape"]["probability"]), name
    picture = Image.fromarray(image_of(5))
    colours = predictor.predict(picture.convert("YCbCr"))["value"]["value"]
    assert colours == pytest.approx(predictor.predict(picture)["value"]["value"], abs=0.05)


@pytest.mark.parametrize("odd", [5, [], None, Image.new("F", (4, 4))])
def test_what_is_no_image_is_refused_in_one_line(run: Path, odd: object) -> None:
    with pytest.raises(UserError, match=r"expected a path, bytes, a PIL image, an array or a tensor|mode F"):
        mtl_dist.load(run).predict(odd)  # type: ignore[arg-type]


def test_values_that_are_not_those_of_the_training_files_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="expected a readable image, found: an image of float32 values"):
        mtl_dist.load(run).predict(image_of(5).astype(np.float32) / 255)


def test_overlays_are_of_the_upright_picture_and_of_every_file(run: Path, tmp_path: Path) -> None:
    """A turned photograph, a grey one, one with alpha, and two files of one name."""
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [tmp_path / "a" / "photo.jpg", tmp_path / "a" / "photo.png", tmp_path / "b" / "photo.png"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    picture.save(files[0], exif=turned)
    picture.convert("L").save(files[1])
    picture.convert("RGBA").save(files[2])
    records = list(predict_files(run, files, tmp_path / "masks", 0.5))
    masks = [Path(record["shape"]["mask"]) for record in records]
    assert len(set(masks)) == 3
    sizes = [(20, 30), (30, 20), (30, 20)]
    for mask, size in zip(masks, sizes, strict=True):
        overlay = mask.with_name(f"{mask.stem}_overlay.png")
        assert Image.open(mask).size == Image.open(overlay).size == size
