"""Decoding by content: the same pixels as Pillow, upright, of the right channels; damage is reported."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_dist.data.decode import decode_image, decode_map
from mtl_dist.data.images import UnreadableImage

rng = np.random.default_rng(0)
COLOUR = np.asarray(
    Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8)).resize((35, 30), Image.Resampling.BICUBIC)
)
GREY = COLOUR[..., 1].copy()
DEEP = (GREY.astype(np.uint16) << 8) + 77


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def chw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy() if array.ndim == 3 else array[..., None].copy()).permute(2, 0, 1)


def with_alpha(array: np.ndarray) -> Image.Image:
    alpha = rng.integers(0, 256, (*array.shape[:2], 1), np.uint8)
    return Image.fromarray(np.concatenate([array.reshape(*array.shape[:2], -1), alpha], axis=-1))


PALETTE = Image.fromarray(COLOUR).quantize(16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.fromarray(COLOUR), "PNG"), COLOUR),
        (encode(with_alpha(COLOUR), "PNG"), COLOUR),
        (encode(Image.fromarray(COLOUR), "BMP"), COLOUR),
        (encode(Image.fromarray(COLOUR), "TIFF"), COLOUR),
        (encode(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR),
        (encode(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
        (encode(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
        (encode(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
        (npy(COLOUR), COLOUR),
        (encode(Image.fromarray(GREY), "PNG"), np.stack([GREY] * 3, axis=-1)),
        (npy(GREY), np.stack([GREY] * 3, axis=-1)),
    ],
    ids="png rgba bmp tiff webp palette transparent_palette gif npy grey_png grey_npy".split(),  # noqa: SIM905
)
def test_lossless_colour_comes_back_exactly(data: bytes, expected: np.ndarray) -> None:
    assert torch.equal(decode_image(data, 3), chw(expected))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.fromarray(GREY), "PNG"), GREY),
        (encode(with_alpha(GREY), "PNG"), GREY),
        (encode(Image.fromarray(GREY > 100), "PNG"), (GREY > 100) * np.uint8(255)),
        (npy(GREY), GREY),
        (npy(GREY[..., None]), GREY),
    ],
    ids=["png", "la", "one_bit", "npy", "npy_with_channel"],
)
def test_lossless_grey_comes_back_exactly(data: bytes, expected: np.ndarray) -> None:
    assert torch.equal(decode_image(data, 1), chw(expected))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "npy"])
def test_colour_is_weighed_to_grey_as_pillow_does(kind: str) -> None:
    data = npy(COLOUR) if kind == "npy" else encode(Image.fromarray(COLOUR), kind)
    expected = np.asarray(Image.fromarray(COLOUR).convert("L"), dtype=int)
    if kind == "JPEG":
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=int)
    assert np.abs(decode_image(data, 1)[0].numpy() - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"quality": 90}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {"quality": 95})],
)
def test_a_jpeg_is_what_pillow_makes_of_it(mode: str, options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(COLOUR).convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
    difference = np.abs(decode_image(data, 3).permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 4
    assert difference.mean() < 0.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_comes_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    quadrants = np.zeros((32, 48, 3), np.uint8)
    quadrants[:16, :24], quadrants[:16, 24:], quadrants[16:, :24] = 250, 160, 80
    stored = Image.fromarray(quadrants)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    image = decode_image(encode(stored, kind, exif=exif), 3)
    assert image.shape == (3, 32, 48)
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(quadrants).int()).abs().max() <= 6


@pytest.mark.parametrize(
    "data",
    [encode(Image.fromarray(DEEP), "PNG"), encode(Image.fromarray(DEEP), "TIFF"), npy(DEEP)],
    ids=["png", "tiff", "npy"],
)
def test_sixteen_bits_come_as_raw_floats(data: bytes) -> None:
    image = decode_image(data, 1, "uint16")
    assert image.dtype == torch.float32
    assert torch.equal(image, chw(DEEP.astype(np.float32)))


def test_floats_come_as_they_are() -> None:
    values = rng.normal(size=(5, 6, 4)).astype(np.float32)
    assert torch.equal(decode_image(npy(values), 4, "float32"), chw(values))
    assert torch.equal(
        decode_image(encode(Image.fromarray(values[..., 0]), "TIFF"), 1, "float32"), chw(values[..., 0])
    )


# ---------------------------------------------------------------- PNG written by hand
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: bytes, depth: int, colour: int, deflated: bytes | None = None) -> bytes:
    header = struct.pack(">IIBBBBB", 35, 30, depth, colour, 0, 0, 0)
    data = deflated if deflated is not None else zlib.compress(rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def filtered(array: np.ndarray, filter_type: int = 0) -> bytes:
    return b"".join(bytes([filter_type]) + row.tobytes() for row in array)


DEEP_COLOUR = rng.integers(0, 2**16, (30, 35, 3), dtype=np.uint16)
DEEP_ROWS = filtered(DEEP_COLOUR.astype(">u2"))


def test_sixteen_bit_colour_keeps_its_depth() -> None:
    image = decode_image(png(DEEP_ROWS, 16, 2), 3, "uint16")
    assert torch.equal(image, chw(DEEP_COLOUR.astype(np.float32)))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(
    "damage",
    [
        lambda rows, depth: flipped(png(rows, depth, 2), 500),
        lambda rows, depth: flipped(png(rows, depth, 2), -20),
        lambda rows, depth: png(rows, depth, 2)[:-700],
        lambda rows, depth: png(rows, depth, 2)[:30],
        lambda rows, depth: png(b"\x09" + rows[1:], depth, 2),
        lambda rows, depth: png(rows, depth, 2, flipped(zlib.compress(rows), 400)),
        lambda rows, depth: png(rows, depth, 2, b""),
    ],
    ids=["pixel_byte", "checksum", "cut", "cut_header", "bad_filter", "deflate", "empty"],
)
def test_a_damaged_png_is_an_error_and_not_the_end_of_the_process(
    damage: Callable[[bytes, int], bytes], depth: int
) -> None:
    rows = DEEP_ROWS if depth == 16 else filtered(COLOUR)
    with pytest.raises(UnreadableImage):
        decode_image(damage(rows, depth), 3, "uint16" if depth == 16 else "uint8")


def test_a_deep_png_of_too_few_rows_is_an_error() -> None:
    with pytest.raises(UnreadableImage, match="damaged"):
        decode_image(png(DEEP_ROWS[: len(DEEP_ROWS) // 2], 16, 2), 3, "uint16")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "no known image format"),
        (
            encode(Image.fromarray(COLOUR), "JPEG")[:300],
            r"a damaged JPEG \(Image is incomplete or truncated\)",
        ),
        (b"\xff\xd8\xff" + bytes(300), "a damaged JPEG"),
        (npy(COLOUR)[:200], r"a damaged \.npy"),
        (npy(COLOUR)[:50], r"a damaged \.npy"),
        (npy(COLOUR)[:7], r"a damaged \.npy"),
        (npy(np.zeros((3, 4, 5, 6), np.uint8)), "an array of uint8"),
        (npy(np.zeros((3, 4))), "an array of float64"),
        (npy(np.zeros((4, 5, 3), np.float32)), "float32 values, where uint8"),
        (encode(Image.fromarray(DEEP), "PNG"), "uint16 values, where uint8"),
        (npy(np.zeros((4, 5, 2), np.uint8)), "2 channels, where 3"),
    ],
)
def test_what_is_no_such_image_is_reported(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as error:
        decode_image(data, 3)
    assert "vision" not in str(error.value)


def test_an_object_array_is_never_unpickled() -> None:
    data = io.BytesIO()
    np.save(data, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match=r"a damaged \.npy"):
        decode_image(data.getvalue(), 1)


def test_a_mask_keeps_its_class_indices() -> None:
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (9, 11))
    assert np.array_equal(decode_map(encode(Image.fromarray(mask), "PNG")), mask)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(Image.fromarray(GREY).convert("LA"), "PNG"), "mode LA"),
        (encode(Image.fromarray(GREY), "JPEG"), "a JPEG mask"),
        (encode(PALETTE, "PNG"), "mode P"),
        (encode(Image.fromarray(GREY), "PNG")[:-60], "damaged"),
        (b"", "empty"),
    ],
)
def test_what_is_no_mask_is_reported(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode_map(data)
