"""Decoding only what a crop shows: the picture of the whole image, and the same judgement of damage."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mtl_dist.data.decode import decode_image, decoder_name, open_picture
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.pictures import Box, DecodedPicture
from mtl_dist.data.turbojpeg import VARIABLE, find_turbojpeg, open_jpeg
from mtl_dist.errors import UserError

needs_turbojpeg = pytest.mark.skipif(
    find_turbojpeg() is None, reason=f"no TurboJPEG 3 library; {VARIABLE} may name one"
)

HEIGHT, WIDTH = 131, 178
_NOISE = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
PHOTO = Image.fromarray(_NOISE).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]


def jpeg(image: Image.Image = PHOTO, **options: Any) -> memoryview:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return memoryview(buffer.getvalue())


def whole(data: memoryview, box: Box, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """What the ordinary decoder would show."""
    return DecodedPicture(decode_image(data, channels)).show(box, size)


def part(data: memoryview, box: Box, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    opened = open_jpeg(data, channels)
    assert opened is not None
    resizing = opened.decode(box, size)
    assert resizing is not None
    return resizing()


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    top, left = draw(st.integers(0, HEIGHT - 1)), draw(st.integers(0, WIDTH - 1))
    return Box(top, left, draw(st.integers(1, HEIGHT - top)), draw(st.integers(1, WIDTH - left)))


@needs_turbojpeg
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@given(box=boxes())
@settings(max_examples=12, deadline=None)
def test_a_crop_shown_at_full_size_has_the_pixels_of_the_whole_image(
    subsampling: str, channels: int, progressive: bool, box: Box
) -> None:
    data = jpeg(subsampling=subsampling, progressive=progressive)
    size = (box.height, box.width)
    difference = part(data, box, size, channels).int() - whole(data, box, size, channels).int()
    # Versions of the library may differ in a rounding.
    assert difference.abs().max() <= 1


@needs_turbojpeg
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("side", [9, 16, 30])
def test_a_picture_shown_smaller_is_within_two_grey_levels_on_average(side: int, mode: str) -> None:
    data = jpeg(PHOTO.convert(mode))
    for box in (Box(0, 0, HEIGHT, WIDTH), Box(1, 3, HEIGHT - 2, WIDTH - 5), Box(31, 33, 99, 101)):
        ours = part(data, box, (side, side))
        assert ours.shape == (3, side, side)
        assert (ours.int() - whole(data, box, (side, side)).int()).abs().float().mean() <= 2


@needs_turbojpeg
def test_a_picture_shown_smaller_is_not_shifted() -> None:
    ramp = np.tile(np.arange(160, dtype=np.uint8)[None, :, None], (160, 1, 3))
    data = jpeg(Image.fromarray(ramp), quality=100)
    for left in range(4):
        shown = part(data, Box(0, left, 80, 120), (5, 7)).float()
        expected = left + 120 / 7 * (torch.arange(7) + 0.5) - 0.5
        assert (shown - expected).abs()[..., 1:-1].max() <= 1.5


@pytest.mark.parametrize("orientation", [0, 3, 6, 8])
def test_a_turned_image_is_left_to_the_ordinary_decoder(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(exif=exif.tobytes())
    assert open_jpeg(data, 3) is None
    box = Box(3, 4, 50, 60)
    assert torch.equal(open_picture(data, 3).show(box, (20, 20)), whole(data, box, (20, 20)))


@needs_turbojpeg
def test_an_upright_image_with_exif_data_is_not() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = 1
    assert open_jpeg(jpeg(exif=exif.tobytes()), 3) is not None


def test_cmyk_is_left_to_the_ordinary_decoder() -> None:
    assert open_jpeg(jpeg(PHOTO.convert("CMYK")), 3) is None


@needs_turbojpeg
def test_damage_inside_the_crop_is_found_and_spoils_nothing_that_follows() -> None:
    good = jpeg()
    cut = good[: len(good) // 2]
    box = Box(100, 100, 20, 20)
    for bad in (cut, good[:100], good[:3]):
        with pytest.raises(UnreadableImage):
            open_picture(bad, 3).show(box, (20, 20))
        assert torch.equal(part(good, box, (20, 20)), whole(good, box, (20, 20)))


_DAMAGED = """
import sys
import numpy as np
from mtl_dist.data.decode import open_picture
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.pictures import Box

data, rng = np.frombuffer(sys.stdin.buffer.read(), np.uint8), np.random.default_rng(0)
for _ in range(600):
    damaged = data[: rng.integers(3, len(data))].copy() if rng.random() < 0.2 else data.copy()
    last = min(len(damaged), 700) if rng.random() < 0.5 else len(damaged)
    damaged[rng.integers(2, last, rng.integers(1, 6))] = rng.integers(0, 256)
    try:
        picture = open_picture(memoryview(damaged), 3)
        if picture.size[0] * picture.size[1] < 10**6:
            top, left = rng.integers(0, picture.size[0]), rng.integers(0, picture.size[1])
            picture.show(Box(int(top), int(left), 1, 1), (1, 1))
    except UnreadableImage:
        pass
"""


@needs_turbojpeg
@pytest.mark.parametrize("progressive", [False, True])
def test_no_damage_ends_the_process(progressive: bool) -> None:
    small = jpeg(PHOTO.resize((40, 40)), progressive=progressive)
    command = [sys.executable, "-W", "ignore", "-c", _DAMAGED]
    done = subprocess.run(command, input=bytes(small), capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------- which library
@pytest.fixture
def unknown_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for again, in the test and after it."""
    find_turbojpeg.cache_clear()
    yield monkeypatch
    find_turbojpeg.cache_clear()


def test_an_empty_variable_means_the_ordinary_decoder(unknown_library: pytest.MonkeyPatch) -> None:
    unknown_library.setenv(VARIABLE, "")
    assert decoder_name().split()[0] in ("torchvision", "simplejpeg")
    data, box = jpeg(), Box(20, 30, 90, 80)
    assert torch.equal(open_picture(data, 3).show(box, (8, 8)), whole(data, box, (8, 8)))


def test_another_file_in_the_variable_is_reported(
    unknown_library: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "library.so").write_bytes(b"no library")
    unknown_library.setenv(VARIABLE, os.fspath(tmp_path / "library.so"))
    with pytest.raises(UserError, match=f"{VARIABLE}: expected the path of a TurboJPEG 3 library"):
        find_turbojpeg()


@needs_turbojpeg
def test_the_decoder_is_named_with_its_version() -> None:
    name, version = decoder_name().split()
    assert name == "TurboJPEG"
    assert version[0].isdigit()
