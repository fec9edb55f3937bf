"""AVIF, HEIC and JPEG 2000: read where Pillow or its plugin knows them, named where not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mtl_dist.data import images
from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage, examine_image
from tests.source_files import fill, prepare_folders, read_back

KNOWN = [("AVIF", "avif"), ("JPEG2000", "jp2"), ("HEIF", "heic")]
FIRST_BYTES = {
    "AVIF": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf",
    "HEIF": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG2000": b"\0\0\0\x0cjP  \r\n\x87\n",
}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "extension"), KNOWN)
def test_a_picture_in_a_modern_format_is_kept_as_it_came_and_decoded_as_pillow_does(
    tmp_path: Path, form: str, extension: str
) -> None:
    if form not in images.known_formats() or form not in Image.SAVE:
        pytest.skip(f"nothing here writes {form}")
    data = [encoded(picture(n), form) for n in range(4)]
    facts = examine_image(data[0])
    assert (facts.extension, facts.width, facts.height, facts.channels, facts.dtype) == (
        extension,
        16,
        12,
        3,
        "uint8",
    )
    src = fill(tmp_path / "in", {f"{n % 2}/{n}.{extension}": each for n, each in enumerate(data)})
    prepare_folders(src, tmp_path / "out", "t", split=(0.5, 0.5))
    stored = {
        each["__key__"]: each[extension]
        for split in ("train", "val")
        for each in read_back(tmp_path / "out", split)
    }
    assert stored == {str(n): each for n, each in enumerate(data)}
    decoded = decode_image(data[0], 3).permute(1, 2, 0).numpy()
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(data[0])).convert("RGB")))
    with pytest.raises(UnreadableImage):
        examine_image(data[0][: len(data[0]) // 2])


@pytest.mark.parametrize("form", FIRST_BYTES)
def test_a_format_that_nothing_here_opens_is_named(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    examine_image(encoded(picture(1), "PNG"))
    monkeypatch.delitem(Image.OPEN, form, raising=False)
    monkeypatch.setattr(images, "known_formats", lambda: ["JPEG", "PNG"])
    with pytest.raises(UnreadableImage, match=f"a picture in {form}, which needs .*[Pp]illow"):
        examine_image(FIRST_BYTES[form] + bytes(40))


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow was built without JPEG 2000")
def test_depth_that_pillow_would_halve_is_refused() -> None:
    data = bytearray(encoded(picture(1), "JPEG2000"))
    at = data.index(b"\xffO\xffQ")
    for channel in range(3):
        data[at + 42 + 3 * channel] = 11
    with pytest.raises(UnreadableImage, match="JPEG2000 of 12 bits per channel, which is read as 8"):
        examine_image(bytes(data))
    grey = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    assert examine_image(encoded(Image.fromarray(grey), "JPEG2000")).dtype == "uint16"
