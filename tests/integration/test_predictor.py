"""A trained run as a predictor: every form of an image, and overlays of odd files."""

from __future__ import annotations

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import mtl_dist
from mtl_dist.checkpoint import steps_in
from mtl_dist.errors import UserError
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.prediction.files import predict_files
from mtl_dist.prediction.records import flat
from tests.tiny_datasets import HEIGHT, WIDTH, image_of, npy, png
from tests.tiny_runs import train_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    train_run(recipe, directory / "run", ["train.max_steps=2", "train.checkpoint_every=1"])
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


def steps_of(run: Path) -> list[int]:
    return steps_in(run / "checkpoints")


def test_another_checkpoint_is_loaded_by_its_name_its_step_or_its_path(run: Path) -> None:
    """The test run keeps its steps 1 and 2: the newest is not that of step 1."""
    picture = image_of(5)
    by_step = {
        step: mtl_dist.load(run, checkpoint=step).predict(picture)["value"]["value"] for step in steps_of(run)
    }
    assert len(set(by_step.values())) == len(by_step) > 1
    last = mtl_dist.load(run, checkpoint="last").predict(picture)["value"]["value"]
    assert last == by_step[max(by_step)]
    for step, value in by_step.items():
        path = run / "checkpoints" / f"step_{step:08d}"
        assert mtl_dist.load(path, device="cpu").predict(picture)["value"]["value"] == value


def test_a_checkpoint_or_device_that_is_not_there_is_refused_with_those_that_are(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r'expected "best", "last" or a step .*\(1, .*found 77'):
        mtl_dist.load(run, checkpoint=77)
    with pytest.raises(UserError, match="found 'newest'"):
        mtl_dist.load(run, checkpoint="newest")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="device: expected one of this machine"):
        mtl_dist.load(run, device="cuda:99")
    with pytest.raises(UserError, match="expected none beside the path of one"):
        mtl_dist.load(run / "checkpoints" / "step_00000001", checkpoint="last")


def test_the_module_and_the_logits_are_what_the_answers_are_made_of(run: Path) -> None:
    predictor = mtl_dist.load(run)
    pictures = [image_of(number) for number in range(40)]
    logits = predictor.logits(pictures)
    answers = predictor.predict_many(pictures)
    probabilities = logits["digit"].softmax(1)
    for row, answer in enumerate(answers):
        assert list(answer["digit"]["probabilities"].values()) == pytest.approx(
            probabilities[row].tolist(), abs=1e-5
        )
    assert logits["shape"].ndim == 4
    module = predictor.module
    assert type(module).__mro__[1:3] == (MultitaskModel, torch.nn.Module) and not module.training
    with torch.no_grad():
        outputs = module(predictor.preprocess(pictures[:2]))
    assert set(outputs) == set(logits)
    assert torch.allclose(outputs["value"], logits["value"][:2], atol=1e-5)


def test_threads_that_share_a_predictor_get_the_answers_of_one_alone(run: Path) -> None:
    predictor = mtl_dist.load(run)
    buffer = io.BytesIO()
    Image.fromarray(image_of(7)).save(buffer, format="JPEG")
    given: list[Any] = [*(image_of(number) for number in range(6)), buffer.getvalue()]
    alone = [predictor.predict(one) for one in given]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(predictor.predict, given * 8))
    for answer, expected in zip(together, alone * 8, strict=True):
        assert answer["digit"] == expected["digit"]
        assert np.array_equal(answer["shape"]["probability"], expected["shape"]["probability"])


def test_an_image_at_fault_is_an_error_of_its_own_kind_that_says_which(run: Path) -> None:
    predictor = mtl_dist.load(run)
    with pytest.raises(mtl_dist.ImageError, match=r"^image 1: expected a readable image"):
        predictor.predict_many([image_of(1), b"not an image"])
    with pytest.raises(mtl_dist.ImageError, match=r"^image: expected a readable image"):
        predictor.predict(b"")
    several: Any
    for several in ("photo.png", b"bytes", Path("photo.png"), 3, None):
        for ask in (predictor.predict_many, predictor.logits, predictor.preprocess):
            with pytest.raises(UserError, match=r"^images: expected a list of images"):
                ask(several)
    with pytest.raises(UserError, match="threshold") as raised:
        predictor.predict(image_of(1), threshold=2)
    assert not isinstance(raised.value, mtl_dist.ImageError)
    # A few hundred bytes that would be 40 GB of pixels.
    bomb = b"P6 200000 70000 255 " + bytes(100)
    with pytest.raises(mtl_dist.ImageError):
        predictor.predict(bomb)


def example_of_the_docs(heading: str) -> str:
    text = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    return text.split(f"## {heading}")[1].split("```python\n")[1].split("```")[0]


def test_the_service_of_the_docs_answers_and_refuses_what_is_no_image(run: Path) -> None:
    pytest.importorskip("fastapi")
    client = pytest.importorskip("fastapi.testclient")
    code = example_of_the_docs("A service").replace("runs/skin/RUN", str(run))
    assert sum(bool(line.strip()) for line in code.splitlines()) == 8
    names: dict[str, Any] = {}
    exec(code, names)
    service = client.TestClient(names["app"])
    octets = {"Content-Type": "application/octet-stream"}
    picture = png(image_of(5))
    answer = service.post("/predict", content=picture, headers=octets)
    assert answer.status_code == 200, answer.text
    assert answer.json() == json.loads(json.dumps(mtl_dist.load(run).predict(picture, maps=False)))
    refused = service.post("/predict", content=b"not an image", headers=octets)
    assert refused.status_code == 422
    assert "expected a readable image" in refused.json()


def test_the_detector_of_the_docs_gets_an_answer_for_each_of_its_boxes(run: Path, tmp_path: Path) -> None:
    picture = Image.fromarray(image_of(5)).resize((64, 48))
    picture.save(tmp_path / "street.jpg")
    code = example_of_the_docs("With a detector").replace("runs/skin/RUN", str(run))
    code = code.replace("street.jpg", str(tmp_path / "street.jpg"))
    boxes = torch.tensor([[0.0, 0, 20, 20], [10.0, 8, 60, 40]])

    class Detector(torch.nn.Module):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8])} for _ in images]

    names: dict[str, Any] = {"detector": Detector()}
    lines = [line for line in code.splitlines() if not line.startswith("detector = ")]
    exec("\n".join(lines), names)
    assert [set(answer) for answer in names["answers"]] == [{"digit", "value", "tags", "shape"}] * 2


def predict(run: Path, *given: Path, stdin: bytes = b"", **options: Any) -> list[dict[str, Any]]:
    """What `mtl predict` writes, as records; masks and overlays into `overlays`."""
    out = given[0].parent / "out.jsonl" if given[0].parent.is_dir() else None
    assert out is not None
    defaults = {"overlays": None, "threshold": 0.5, "split": None}
    predict_files(
        run,
        [str(one) for one in given],
        out=out,
        stdin=io.BytesIO(stdin),
        note=lambda line: None,
        **defaults | options,
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_broken_file_is_an_error_and_the_others_are_answered(run: Path, tmp_path: Path) -> None:
    """Also where a batch has broken files alone; each answer is that of its own image."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(image_of(100 * number)))
    for number in range(34):
        (folder / f"1{number:02d}.jpg").write_bytes(b"no image")
    (folder / "deep.npy").write_bytes(npy(image_of(5).astype(np.float32)))
    records = predict(run, folder)
    predictor = mtl_dist.load(run)
    for record in records:
        name = Path(record["image"]).name
        if name in ("0.png", "1.png", "2.png"):
            answer = predictor.predict(folder / name)
            assert record["value"]["value"] == pytest.approx(answer["value"]["value"], rel=1e-4)
        else:
            assert record["error"].startswith("expected a readable image, found: ")
    assert len(records) == 38
    assert "float32" in next(one["error"] for one in records if one["image"].endswith("deep.npy"))


def test_a_table_of_predictions_has_what_the_lines_have(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(image_of(1)))
    (tmp_path / "b.png").write_bytes(b"no image")
    files = [tmp_path / "b.png", tmp_path / "a.png"]
    lines = predict(run, *files, overlays=tmp_path / "masks")
    predict_files(
        run,
        [str(file) for file in files],
        out=tmp_path / "out.csv",
        overlays=tmp_path / "masks",
        threshold=0.5,
        split=None,
        stdin=io.BytesIO(),
        note=lambda line: None,
    )
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        bad, good = csv.DictReader(file)
    assert bad["error"] == lines[0]["error"]
    expected = {key: value for key, value in flat(lines[1]).items() if not isinstance(value, list)}
    assert {key: good[key] for key in expected} == {
        key: "" if value is None else str(value) for key, value in expected.items()
    }


def test_a_stack_is_not_answered_as_one_image(run: Path, tmp_path: Path) -> None:
    pages = np.stack([image_of(number) for number in range(3)])
    tifffile.imwrite(tmp_path / "s.tif", pages, photometric="rgb")
    with pytest.raises(UserError, match="several pages, where one image is expected"):
        mtl_dist.load(run).predict(tmp_path / "s.tif")
    records = predict(run, tmp_path / "s.tif", overlays=tmp_path / "masks")
    assert [Path(record["image"]).name for record in records] == ["s.tif#0", "s.tif#1", "s.tif#2"]
    masks = [Path(record["shape"]["mask"]).name for record in records]
    assert masks == ["s-0_shape.png", "s-1_shape.png", "s-2_shape.png"]
    answers = mtl_dist.load(run).predict_many(pages)
    for record, answer in zip(records, answers, strict=True):
        assert record["value"]["value"] == pytest.approx(answer["value"]["value"], rel=1e-4)


def test_nothing_to_predict_is_a_mistake(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected at least one image, found none"):
        predict(run, tmp_path / "empty")


def test_masks_hold_class_indices_in_colours_and_overlays_are_of_the_upright_picture(
    run: Path, tmp_path: Path
) -> None:
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
    records = predict(run, *files, overlays=tmp_path / "masks")
    assert len({record["shape"]["mask"] for record in records}) == 3
    predictor = mtl_dist.load(run)
    for record, file, (width, height) in zip(records, files, [(20, 30), (30, 20), (30, 20)], strict=True):
        with Image.open(record["shape"]["mask"]) as mask, Image.open(record["shape"]["overlay"]) as overlay:
            assert mask.mode == "P"
            assert mask.size == (width, height)
            assert np.array_equal(np.asarray(mask), predictor.predict(file)["shape"]["mask"])
            colours = np.array(mask.getpalette()).reshape(-1, 3)[:2]
            assert len({tuple(colour) for colour in colours.tolist()}) == 2
            assert (overlay.width > overlay.height) == (width > height)
