"""IDX files and CIFAR records: every picture with its labels, and damage refused in one clear line."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mtl_dist.commands.options import words
from mtl_dist.data.decode import decode_image
from mtl_dist.data.manifest import Manifest, read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.errors import UserError
from mtl_dist.importers.measures import slant, thickness
from mtl_dist.importers.pixels import SMALL, encoded_picture
from tests.source_files import HERE, contents, fill, prepare_cifar, prepare_idx

NUM_TRAIN, NUM_TEST = 40, 10


# ---------------------------------------------------------------- IDX
def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def picture_of(number: int) -> np.ndarray:
    return np.full((6, 5), number + 1, np.uint8)


def idx_files(packed: bool = True) -> dict[str, bytes]:
    """Pictures whose grey is their number, of class number % 3."""
    files, end = {}, ".gz" if packed else ""
    for name, numbers in (("train", range(NUM_TRAIN)), ("t10k", range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))):
        pack = gzip.compress if packed else bytes
        files[f"{name}-images-idx3-ubyte{end}"] = pack(idx(np.stack([picture_of(n) for n in numbers])))
        files[f"{name}-labels-idx1-ubyte{end}"] = pack(idx(np.array([n % 3 for n in numbers], np.uint8)))
    return files


def samples(out: Path, split: str) -> list[tuple[np.ndarray, dict[str, object]]]:
    reader = SplitReader(out, read_manifest(out), split)
    rows = [reader.read(row) for row in range(reader.num_samples)]
    channels = read_manifest(out).channels
    return [(decode_image(s.image, channels).permute(1, 2, 0).numpy(), s.labels) for s in rows]


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_every_idx_picture_keeps_its_label_and_a_tenth_of_train_is_held_out(
    tmp_path: Path, packed: bool
) -> None:
    src = fill(tmp_path / "src", idx_files(packed))
    manifest = prepare_idx(src, tmp_path / "out", "digit", classes=["a", "b", "c"], options=HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 37,  # a tenth of each class, which has 14, 13 and 13
        "val": 3,
        "test": 10,
    }
    assert manifest.tasks["digit"].classes == ("a", "b", "c")
    assert (manifest.channels, manifest.image_dtype) == (1, "uint8")
    seen = set()
    for split in manifest.splits:
        for picture, labels in samples(tmp_path / "out", split):
            number = int(picture[0, 0, 0]) - 1
            seen.add(number)
            np.testing.assert_array_equal(picture[:, :, 0], picture_of(number))
            assert labels == {"digit": number % 3}
            assert (number >= NUM_TRAIN) == (split == "test")
    assert seen == set(range(NUM_TRAIN + NUM_TEST))


def test_nothing_is_held_out_where_no_share_is_asked_for(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", idx_files())
    manifest = prepare_idx(src, tmp_path / "out", val=0.0, options=HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 40, "test": 10}
    assert manifest.tasks["label"].classes == ("0", "1", "2")


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", idx_files())
    prepare_idx(src, tmp_path / "one", options=HERE)
    prepare_idx(src, tmp_path / "two", options=HERE)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_measures_are_regression_tasks_with_their_unit(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the demo extra is not installed")
    src = fill(tmp_path / "src", idx_files())
    manifest = prepare_idx(src, tmp_path / "out", measure=["thickness", "slant"], options=HERE)
    assert [(name, info.kind, info.unit) for name, info in manifest.tasks.items()] == [
        ("label", "classification", ""),
        ("thickness", "regression", "px"),
        ("slant", "regression", "degrees"),
    ]


Damage = Callable[[dict[str, bytes]], None]
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def replaced(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(files: dict[str, bytes]) -> None:
        files[name] = change(files[name])

    return damage


WRONG_IDX: dict[str, tuple[Damage, str]] = {
    "another magic number": (
        replaced(IMAGES, lambda _: gzip.compress(b"\x89PNG" + bytes(40))),
        r"images-idx3-ubyte.gz: expected an IDX file, which begins with 00 00 08, found 89 50 4e 47",
    ),
    "values of another type": (
        replaced(IMAGES, lambda _: gzip.compress(idx(np.zeros((2, 6, 5), "f4"), 13))),
        "expected an IDX file of unsigned bytes .*, found floats",
    ),
    "a truncated file": (
        replaced(IMAGES, lambda data: gzip.compress(gzip.decompress(data)[:-7])),
        r"expected 1,216 bytes \(40x6x5 and the header\), found 1,209",
    ),
    "a truncated header": (
        replaced(IMAGES, lambda data: gzip.compress(gzip.decompress(data)[:9])),
        "expected a header of 16 bytes, found 9",
    ),
    "a truncated gzip": (replaced(IMAGES, lambda data: data[:-9]), "expected a whole gzip file"),
    "an empty file": (replaced(LABELS, lambda _: b""), "found an empty file"),
    "labels of another number": (
        replaced(LABELS, lambda _: gzip.compress(idx(np.zeros(39, np.uint8)))),
        "expected 40 labels, one per picture in .*, found 39",
    ),
    "pictures and labels exchanged": (
        replaced(LABELS, lambda _: gzip.compress(idx(np.zeros((40, 6, 5), np.uint8)))),
        "expected one label per picture, found 3 dimensions",
    ),
    "a label out of range": (
        replaced(LABELS, lambda _: gzip.compress(idx(np.array([0, 1, 2, 9] * 10, np.uint8)))),
        "picture 3: expected a class of label from 0 to 2, found 9. 10 labels are out of range",
    ),
    "no labels": (lambda files: files.__delitem__(LABELS), "expected a file of labels of train beside it"),
    "no IDX files": (
        lambda files: (files.clear(), files.update({"a.txt": b"x"}))[0],  # type: ignore[func-returns-value]
        "expected files such as train-images-idx3-ubyte.gz, found none",
    ),
}


@pytest.mark.parametrize("what", WRONG_IDX)
def test_damaged_idx_files_are_refused_in_one_line_and_leave_nothing(tmp_path: Path, what: str) -> None:
    damage, message = WRONG_IDX[what]
    files = idx_files()
    damage(files)
    src = fill(tmp_path / "src", files)
    with pytest.raises(UserError, match=message) as caught:
        prepare_idx(src, tmp_path / "out", classes=["a", "b", "c"], options=HERE)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_unknown_measure_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", idx_files())
    with pytest.raises(UserError, match="expected some of thickness, slant, found width"):
        prepare_idx(src, tmp_path / "out", measure=["width"], options=HERE)


# ---------------------------------------------------------------- measures
def stroke(width: int, lean: float) -> np.ndarray:
    """One stroke of this width, leaning to the right by so many pixels over its 60."""
    image = Image.new("L", (80, 80))
    ImageDraw.Draw(image).line([(40 - lean / 2, 70), (40 + lean / 2, 10)], fill=255, width=width)
    return np.asarray(image)


@pytest.mark.parametrize("lean", [-30, 0, 20, 45])
def test_slant_is_the_angle_of_a_stroke(lean: int) -> None:
    expected = np.degrees(np.arctan2(lean, 60))
    assert slant(stroke(4, lean)) == pytest.approx(expected, abs=1.0)


def test_a_picture_without_ink_is_upright() -> None:
    assert slant(np.zeros((8, 8), np.uint8)) == 0.0


@pytest.mark.parametrize("width", [3, 6])
def test_thickness_is_the_width_of_a_stroke(width: int) -> None:
    pytest.importorskip("skimage", reason="the demo extra is not installed")
    assert thickness(stroke(width, 0)) == pytest.approx(width, rel=0.12)


# ---------------------------------------------------------------- pixels
@pytest.mark.parametrize(
    ("shape", "dtype", "begin"),
    [
        ((28, 28), "u1", b"\x93NUMPY"),
        ((28, 28, 1), "u1", b"\x93NUMPY"),
        ((32, 32, 3), "u1", b"\x93NUMPY"),
        ((200, 200), "u1", b"\x89PNG"),
        ((200, 200, 3), "u1", b"\x89PNG"),
        ((200, 200, 2), "u1", b"\x93NUMPY"),
        ((200, 200), "u2", b"\x93NUMPY"),
        ((20, 20), ">u2", b"\x93NUMPY"),
    ],
)
def test_pixels_come_back_as_they_were(shape: tuple[int, ...], dtype: str, begin: bytes) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    data = encoded_picture(pixels)
    assert data.startswith(begin)
    assert (begin == b"\x93NUMPY") == (pixels.nbytes <= SMALL or pixels.dtype != "u1" or shape[-1] == 2)
    channels = shape[2] if len(shape) == 3 else 1
    found = decode_image(data, channels, "uint8" if pixels.dtype == "u1" else "uint16")
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy().reshape(shape), pixels)


# ---------------------------------------------------------------- CIFAR
COARSE = ["land", "sea"]


def cifar_records(numbers: range, heads: int = 2) -> bytes:
    """Records whose pixels are their number in red, 100 in green, 200 in blue; labels n % 2, n % 4, n % 6."""
    records = b""
    for n in numbers:
        labels = bytes([n % 2, n % 4, n % 6][:heads])
        records += labels + bytes([n]) * 1024 + bytes([100]) * 1024 + bytes([200]) * 1024
    return records


def cifar_files() -> dict[str, object]:
    return {
        "train.bin": cifar_records(range(40)),
        "test.bin.gz": gzip.compress(cifar_records(range(40, 50))),
        "coarse_label_names.txt": "\n".join(COARSE) + "\n",
        "readme.html": "<html>",
    }


def prepared_cifar(tmp_path: Path, files: dict[str, object], heads: str) -> Manifest:
    return prepare_cifar(fill(tmp_path / "src", files), tmp_path / "out", words("", heads), options=HERE)


def test_every_record_keeps_its_labels_planes_and_names(tmp_path: Path) -> None:
    manifest = prepared_cifar(tmp_path, cifar_files(), "coarse,fine")
    assert manifest.tasks["coarse"].classes == ("land", "sea")
    assert manifest.tasks["fine"].classes == ("0", "1", "2", "3")
    seen = set()
    for split in ("train", "val", "test"):
        for picture, labels in samples(tmp_path / "out", split):
            number = int(picture[0, 0, 0])
            seen.add(number)
            assert picture.shape == (32, 32, 3)
            assert (picture == [number, 100, 200]).all()
            assert labels == {"coarse": number % 2, "fine": number % 4}
    assert seen == set(range(50))


@pytest.mark.parametrize("heads", [1, 3])
def test_any_number_of_heads_is_read(tmp_path: Path, heads: int) -> None:
    names = ["a", "b", "c"][:heads]
    files = {
        "data_batch_1.bin": cifar_records(range(30), heads),
        "data_batch_2.bin": cifar_records(range(30, 60), heads),
    }
    manifest = prepared_cifar(tmp_path, dict(files), ",".join(names))
    assert list(manifest.tasks) == names
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 54, "val": 6}


def test_the_same_record_in_train_and_test_is_reported(tmp_path: Path) -> None:
    files = cifar_files() | {"test.bin.gz": cifar_records(range(38, 45))}
    manifest = prepared_cifar(tmp_path, files, "coarse,fine")
    assert any("the same image in" in note for note in manifest.notes)


WRONG_CIFAR: dict[str, tuple[dict[str, object], str, str]] = {
    "a truncated record": (
        {"train.bin": cifar_records(range(3))[:-1]},
        "coarse,fine",
        r"train.bin: expected records of 3,074 bytes \(2 label\(s\) and 32x32x3\), found 9,221: 2 records",
    ),
    "another number of heads": (
        {"train.bin": cifar_records(range(40), 1)},
        "coarse,fine",
        r"It holds whole records of 1 label\(s\): name as many heads",
    ),
    "a label out of range": (
        {"train.bin": bytes([1, 7]) + cifar_records(range(9))[2:], "fine_label_names.txt": "x\ny\nz\nw"},
        "coarse,fine",
        "train.bin, picture 0: expected a class of fine from 0 to 3, found 7",
    ),
    "an empty file": ({"train.bin": b""}, "coarse,fine", "found 0: 0 records"),
    "no train file": (
        {"test.bin": cifar_records(range(4))},
        "a,b",
        "expected training pictures, found only test",
    ),
    "no records": ({"pictures.bin": b"x"}, "a,b", "expected files such as train.bin"),
    "one name twice": (
        {"train.bin": cifar_records(range(9)), "a_label_names.txt": "x\nx\n"},
        "a,b",
        "expected one class name per line, each once",
    ),
    "a head twice": ({"train.bin": cifar_records(range(9))}, "a,a", "expected each name once, found a, a"),
}


@pytest.mark.parametrize("what", WRONG_CIFAR)
def test_damaged_records_are_refused_in_one_line_and_leave_nothing(tmp_path: Path, what: str) -> None:
    files, heads, message = WRONG_CIFAR[what]
    with pytest.raises(UserError, match=message) as caught:
        prepared_cifar(tmp_path, files, heads)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
