"""Images and masks as people keep them: told by content, refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage, examine_image, extension_of
from mtl_dist.data.masks import MaskValueError, read_mask
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


def test_extensions_have_one_spelling() -> None:
    names = ["a.JPG", "b.jpeg", "c.tiff", "d.b.png", "no_extension", "folder.jpg/file"]
    assert [extension_of(name) for name in names] == ["jpg", "jpg", "tif", "png", "", ""]


def grey(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


def classes_of(data: bytes, num_classes: int = 2, values: dict[int, int] | None = None) -> list[list[int]]:
    mask = read_mask(data, num_classes, values or {})
    stored = Image.open(io.BytesIO(mask.png))
    assert (stored.format, stored.mode, stored.size) == ("PNG", "L", (mask.width, mask.height))
    array = np.asarray(stored)
    assert mask.class_pixels == tuple(int((array == index).sum()) for index in range(num_classes))
    return array.tolist()


def palette(values: list[list[int]], colours: list[int]) -> bytes:
    image = Image.fromarray(np.array(values, np.uint8), "P")
    image.putpalette(colours)
    return encoded(image)


def test_class_indices_stay_as_they_are_byte_for_byte() -> None:
    data = encoded(grey([[0, 1, 2], [255, 1, 0]]))
    assert read_mask(data, 3, {}).png == data


def test_a_binary_mask_may_be_0_and_255_or_have_soft_edges() -> None:
    assert classes_of(encoded(grey([[0, 255]]))) == [[0, 1]]
    assert classes_of(encoded(grey([[0, 127, 128, 255]]))) == [[0, 0, 1, 1]]
    assert classes_of(encoded(grey([[255, 255]]))) == [[1, 1]]
    assert classes_of(encoded(grey([[0, 255]]), "JPEG", quality=100)) == [[0, 1]]


def test_0_1_and_255_are_two_classes_and_ignored_pixels() -> None:
    assert classes_of(encoded(grey([[0, 1, 255]]))) == [[0, 1, 255]]


def test_a_one_bit_mask_is_two_classes() -> None:
    data = encoded(grey([[0, 255]]).convert("1"))
    assert classes_of(data) == [[0, 1]]
    assert read_mask(data, 2, {}).convention == "either"


def test_a_palette_of_greys_means_its_greys_even_when_white_comes_first() -> None:
    upside_down = [value for grey_level in range(255, -1, -1) for value in [grey_level] * 3]
    assert classes_of(palette([[0, 255]], upside_down)) == [[1, 0]]


def test_a_palette_of_colours_means_its_indices() -> None:
    assert classes_of(palette([[0, 1]], [0, 0, 0, 128, 0, 0])) == [[0, 1]]
    assert classes_of(palette([[0, 2, 1]], [0, 0, 0, 128, 0, 0, 0, 128, 0]), 3) == [[0, 2, 1]]


def test_a_table_of_values_decides_alone() -> None:
    values = {1: 0, 2: 1, 3: 2}
    assert classes_of(encoded(grey([[1, 2, 3, 255]])), 3, values) == [[0, 1, 2, 255]]
    assert classes_of(encoded(grey([[0, 255]])), 2, {0: 0, 255: 1}) == [[0, 1]]
    assert classes_of(encoded(grey([[0, 255]])), 2, {0: 0, 1: 1}) == [[0, 255]]
    with pytest.raises(MaskValueError, match=r"expected the values 1, 2, 3 .* found 7"):
        read_mask(encoded(grey([[1, 7]])), 3, values)


def test_a_colour_file_of_greys_is_a_mask_and_one_of_colours_is_not() -> None:
    assert classes_of(encoded(grey([[0, 255]]).convert("RGB"))) == [[0, 1]]
    with pytest.raises(UnreadableImage, match="in colours"):
        read_mask(encoded(COLOUR), 2, {})


def test_a_value_beyond_the_classes_is_refused() -> None:
    with pytest.raises(MaskValueError, match=r"expected class indices from 0 to 2 .*, found 3"):
        read_mask(encoded(grey([[0, 3]])), 3, {})
