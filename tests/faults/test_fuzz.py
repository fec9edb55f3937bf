"""Damaged files: what reads them answers with a value or its own error, and with nothing else.

Seeded: the same cases every time. `make fuzz` tries a hundred times as many.
"""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtl_dist.config.yaml_text import YamlError, parse
from mtl_dist.data.decode import decode_image, decode_map, open_picture
from mtl_dist.data.images import UnreadableImage, examine_image
from mtl_dist.data.manifest import MANIFEST_NAME, read_manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.sources import Source
from mtl_dist.recipe import load_recipe
from tests.tiny_datasets import write_dataset
from tests.tiny_runs import RECIPE

CASES = int(os.environ.get("FUZZ_CASES", "150"))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file gone wrong: bits, cuts, runs of one byte, pieces moved, lengths blown up."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(max(1, len(content)))
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at:]
            case 2:
                content[at : at + rng.randrange(1, 64)] = bytes([rng.choice((0, 255))]) * rng.randrange(1, 64)
            case 3:
                piece = content[at : at + rng.randrange(1, 200)]
                to = rng.randrange(max(1, len(content)))
                content[to:to] = piece
            case 4:
                content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
            case 5:
                del content[at : at + rng.randrange(1, 64)]
    return bytes(content)


def cases(data: bytes, name: str, count: int = CASES) -> Iterator[bytes]:
    for number in range(count):
        yield damaged(data, random.Random(f"{name} {number}"))


def survives(call: Callable[[], Any], data: object, *expected: type[Exception]) -> None:
    try:
        call()
    except expected as error:
        assert str(error).strip()
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}, of {data!r:.400}") from error


# ---------------------------------------------------------------- images
def image(format: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 17, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((9, 7, 3), np.float32))
    return file.getvalue()


def deep_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(file, "PNG")
    return file.getvalue()


IMAGES = {
    "jpeg": image("JPEG"),
    "png": image("PNG"),
    "palette": image("PNG", "P"),
    "deep png": deep_png(),
    "gif": image("GIF"),
    "bmp": image("BMP"),
    "tiff": image("TIFF"),
    "webp": image("WEBP"),
    "npy": array(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IMAGES)
def test_a_damaged_image_is_unreadable_or_an_image(name: str) -> None:
    for data in cases(IMAGES[name], name):
        survives(lambda data=data: decode_image(data, 3), data, UnreadableImage)
        survives(lambda data=data: open_picture(memoryview(data), 3), data, UnreadableImage)
        survives(lambda data=data: examine_image(data), data, UnreadableImage)
        survives(lambda data=data: decode_map(data), data, UnreadableImage)


# ---------------------------------------------------------------- text
def test_a_damaged_recipe_is_a_recipe_or_lines_about_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for data in cases(RECIPE.encode(), "recipe"):
        path.write_bytes(data)
        survives(lambda: load_recipe(path), data, UserError)
        text = data.decode("utf-8", errors="replace")
        survives(lambda text=text: parse(text), text, YamlError)


def test_a_damaged_manifest_is_a_manifest_or_one_line_about_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 3})
    path = tmp_path / "tiny" / MANIFEST_NAME
    for data in cases(path.read_bytes(), "manifest"):
        path.write_bytes(data)
        survives(lambda: read_manifest(path.parent), data, UserError)


def test_a_manifest_with_values_of_other_types_is_one_line(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 3})
    path = tmp_path / "tiny" / MANIFEST_NAME
    whole = json.loads(path.read_text())
    rng = random.Random(0)
    for _ in range(CASES):
        content = json.loads(json.dumps(whole))
        at = content
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys:
                break
            key = rng.choice(list(keys))
            if isinstance(at[key], dict | list) and rng.random() < 0.7:
                at = at[key]
                continue
            at[key] = rng.choice((None, "x", -1, 1e300, [], {}, True, "../../etc", ["a"]))
            break
        path.write_text(json.dumps(content))
        survives(lambda: read_manifest(path.parent), content, UserError)


# ---------------------------------------------------------------- archives
def test_a_damaged_zip_is_read_or_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"abc" * 100)
        archive.writestr("../b.txt", b"abc")
    for number, data in enumerate(cases(file.getvalue(), "zip")):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        survives(lambda path=path: Source("a.txt", 0, 0, str(path)).read(), data, UserError)
    assert not (tmp_path.parent / "b.txt").exists()
