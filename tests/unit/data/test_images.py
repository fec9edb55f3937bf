"""Images as people keep them: told by content, refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage, examine_image, extension_of, image_size
from tests.source_files import encoded

RNG = np.random.default_rng(0)
COLOUR = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8))


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(COLOUR, "JPEG", exif=exif)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ZOO = {
    "RGB JPEG": (encoded(COLOUR, "JPEG"), ("jpg", 9, 6, 3, "uint8", ())),
    "grey JPEG": (encoded(COLOUR.convert("L"), "JPEG"), ("jpg", 9, 6, 1, "uint8", ())),
    "CMYK JPEG": (encoded(COLOUR.convert("CMYK"), "JPEG"), ("jpg", 9, 6, 3, "uint8", ("cmyk",))),
    "turned JPEG": (rotated(6), ("jpg", 6, 9, 3, "uint8", ("rotated",))),
    "mirrored JPEG": (rotated(2), ("jpg", 9, 6, 3, "uint8", ("rotated",))),
    "RGB PNG": (encoded(COLOUR), ("png", 9, 6, 3, "uint8", ())),
    "1-bit PNG": (encoded(COLOUR.convert("1")), ("png", 9, 6, 1, "uint8", ())),
    "RGBA PNG": (encoded(COLOUR.convert("RGBA")), ("png", 9, 6, 3, "uint8", ("alpha",))),
    "grey PNG with alpha": (encoded(COLOUR.convert("LA")), ("png", 9, 6, 1, "uint8", ("alpha",))),
    "palette PNG": (encoded(COLOUR.convert("P")), ("png", 9, 6, 3, "uint8", ("palette",))),
    "16-bit grey PNG": (
        encoded(Image.fromarray(RNG.integers(0, 60000, (6, 9)).astype(np.uint16))),
        ("png", 9, 6, 1, "uint16", ()),
    ),
    "BMP of a width of 16": (encoded(COLOUR.resize((16, 6)), "BMP"), ("bmp", 16, 6, 3, "uint8", ())),
    "GIF": (encoded(COLOUR.convert("P"), "GIF"), ("gif", 9, 6, 3, "uint8", ("palette",))),
    "WebP": (encoded(COLOUR, "WEBP"), ("webp", 9, 6, 3, "uint8", ())),
    "TIFF": (encoded(COLOUR, "TIFF"), ("tif", 9, 6, 3, "uint8", ())),
    "16-bit grey TIFF": (
        encoded(Image.fromarray(RNG.integers(0, 60000, (6, 9)).astype(np.uint16)), "TIFF"),
        ("tif", 9, 6, 1, "uint16", ()),
    ),
    "float TIFF": (
        encoded(Image.fromarray(RNG.random((6, 9)).astype(np.float32)), "TIFF"),
        ("tif", 9, 6, 1, "float32", ()),
    ),
    "npy with five channels": (npy(np.zeros((6, 9, 5), np.float32)), ("npy", 9, 6, 5, "float32", ())),
    "npy without channels": (npy(np.zeros((6, 9), np.uint8)), ("npy", 9, 6, 1, "uint8", ())),
}


@pytest.mark.parametrize("name", ZOO)
def test_an_image_is_told_by_its_bytes_and_the_reader_agrees(name: str) -> None:
    data, expected = ZOO[name]
    facts = examine_image(data)
    found = (facts.extension, facts.width, facts.height, facts.channels, facts.dtype, facts.oddities)
    assert found == expected
    assert examine_image(data, decode=False) == facts
    image_CHW = decode_image(data, facts.channels, facts.dtype)  # type: ignore[arg-type]
    assert tuple(image_CHW.shape) == (facts.channels, facts.height, facts.width)


DAMAGED = {
    "an empty file": (b"", "an empty file"),
    "text": (b"not an image at all", "no known image format"),
    "half a JPEG": (encoded(COLOUR.resize((300, 200)), "JPEG")[:2000], "truncated"),
    "half a PNG": (encoded(COLOUR.resize((300, 200)))[:2000], "damaged image"),
    "an animation": (encoded(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(180)]), "2 frames"),
    "complex numbers": (npy(np.zeros((4, 4), np.complex64)), "type complex64"),
    "undefined values": (npy(np.full((4, 4), np.nan, np.float32)), "undefined"),
    "half an array": (npy(np.zeros((40, 40), np.uint8))[:900], "damaged .npy"),
    "pickled objects": (npy(np.array([[{}]], dtype=object)), "damaged .npy"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_whole_image_is_refused_with_a_reason(name: str) -> None:
    data, reason = DAMAGED[name]
    with pytest.raises(UnreadableImage, match=reason):
        examine_image(data)


def test_a_header_alone_does_not_show_that_the_rest_is_missing() -> None:
    cut = encoded(COLOUR.resize((300, 200)), "JPEG")[:2000]
    assert examine_image(cut, decode=False).width == 300


@pytest.mark.parametrize("place", ["before", "behind", "nowhere"])
def test_a_png_is_decoded_for_its_facts_only_where_it_may_be_turned_behind_its_pixels(place: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(COLOUR)
    turned = encoded(COLOUR, exif=exif)
    chunk = turned[turned.index(b"eXIf") - 4 : turned.index(b"IDAT") - 4]
    data = {"before": turned, "behind": plain[:-12] + chunk + plain[-12:], "nowhere": plain}[place]
    facts = examine_image(data, decode=False)
    assert (facts.width, facts.height, facts.oddities) == (
        (9, 6, ()) if place == "nowhere" else (6, 9, ("rotated",))
    )
    assert image_size(data) == (9, 6)
    if place == "nowhere":
        pixels = plain.index(b"IDAT") + 4
        broken = plain[:pixels] + bytes(40) + plain[pixels + 40 :]
        assert examine_image(broken, decode=False) == facts
        with pytest.raises(UnreadableImage):
            examine_image(broken)


@pytest.mark.parametrize("name", ZOO)
def test_the_size_of_an_image_is_in_its_header(name: str) -> None:
    data, (_, width, height, *_) = ZOO[name]
    assert sorted(image_size(data)) == sorted((width, height))


def test_extensions_have_one_spelling() -> None:
    names = ["a.JPG", "b.jpeg", "c.tiff", "d.b.png", "no_extension", "folder.jpg/file"]
    assert [extension_of(name) for name in names] == ["jpg", "jpg", "tif", "png", "", ""]
