"""What an image file is, found from its bytes: format, size, channels, depth, and whether it decodes.

Names lie: a `.png` may hold a JPEG. Everything here goes by content.
"""

from __future__ import annotations

import io
import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

IMAGE_EXTENSIONS = frozenset(
    {
        *("jpg", "jpeg", "jfif", "png", "bmp", "gif", "tif", "tiff", "webp", "npy"),
        *("avif", "heic", "heif", "jp2", "j2k"),
    }
)
"""The file names that are taken for images, in lower case."""

_STORED_AS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with more pictures behind it, as phones write; decoders read the first
    "PNG": "png",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "WEBP": "webp",
    "AVIF": "avif",
    "HEIF": "heic",
    "JPEG2000": "jp2",
}
_PLUGINS = {
    "AVIF": "Pillow 11.3 or later, built with libavif",
    "HEIF": 'pillow-heif (pip install "mtl-dist[heic]")',
    "JPEG2000": "Pillow built with OpenJPEG",
}
"""What opens the formats that not every installation knows."""
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "La": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "F": 1}
_CHANNELS |= {"P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "RGBX": 3, "RGBa": 3, "CMYK": 3, "YCbCr": 3}
_SAME_EXTENSION = {"jpeg": "jpg", "jfif": "jpg", "tiff": "tif", "heif": "heic", "j2k": "jp2"}
_ORIENTATION, _SAMPLES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 274, 277, 338, 339  # tags of TIFF and EXIF
_EXIF_IN_PNG = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")
"""What stands in a PNG before what EXIF, or XMP, says of it."""
_SIGNED = 2
_ALPHA = (1, 2)  # what an extra sample may be, besides an unnamed one
_HEAD = 1 << 14  # where a picture says what it is
_SAMPLES_READ = {"RGB": 3, "RGBA": 3, "RGBX": 3, "RGBa": 3, "YCbCr": 3, "LAB": 3, "CMYK": 4}
"""The samples of a TIFF's pixel that are read, alpha aside, by the mode that Pillow opens it in; else 1."""
MAX_PIXELS = 178_956_970
"""The most pixels of an image, as a header of some bytes can ask for any number: 13,377 x 13,377, where
Pillow draws the line too."""

_SIZES_OF_JPEG = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""The markers of the segments that hold a JPEG's size."""

_NPY_DTYPES = ("uint8", "uint16", "float32")


_DAMAGES = (MemoryError, OverflowError, LookupError, RecursionError, AssertionError, tokenize.TokenError)
"""What readers raise, besides errors that say what is wrong, on bytes that nobody has written on purpose."""


class UnreadableImage(Exception):
    """The bytes are no image that can be used; the message says why, without the file's name."""


class PartlyRead(UnreadableImage):
    """An image of which readers of pictures would see a part only: of its channels, pages or bits."""


@dataclass(frozen=True)
class ImageFacts:
    """One image: its true extension, its size as displayed (after EXIF rotation), channels and depth.

    `oddities` are the words of what its reader has to correct: "rotated", "alpha", "palette", "cmyk".
    `orientation` is that of EXIF, 1 where the pixels came as they are displayed.
    """

    extension: str
    width: int
    height: int
    channels: int
    dtype: str
    oddities: tuple[str, ...] = ()
    orientation: int = 1


@cache
def known_formats() -> list[str]:
    """What Pillow and its plugins open here; MPO is found inside JPEG."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in _STORED_AS if name != "MPO" and name in Image.OPEN]


def _format_of(head: bytes) -> str:
    """The format of those that not every installation knows, by its first bytes; nothing of others."""
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(len(head), 64), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIF" if brands & {b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc"} else ""
    return "JPEG2000" if head.startswith((b"\0\0\0\x0cjP  ", b"\xffO\xffQ")) else ""


def _depths(data: bytes) -> list[int]:
    """The bits of each channel of a picture of these formats, as far as its head says them."""
    if (at := data.find(b"\xffO\xffQ", 0, _HEAD)) >= 0:
        (number,) = struct.unpack_from(">H", data, at + 40)
        return [(data[at + 42 + 3 * n] & 0x7F) + 1 for n in range(number)]
    if (at := data.find(b"pixi", 0, _HEAD)) >= 0:
        return list(data[at + 9 : at + 9 + data[at + 8]])
    return []


def check_size(width: int, height: int) -> None:
    """Refuse an image before it is decoded, if it says that it is too large.

    Raises:
        UnreadableImage: it does.
    """
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width:,} x {height:,} pixels, where at most {MAX_PIXELS:,} are decoded")


def check_pixels(number: int) -> None:
    """Refuse images that are decoded together, if they say that they are too large.

    Raises:
        UnreadableImage: they do.
    """
    if number > MAX_PIXELS:
        raise UnreadableImage(f"{number:,} pixels, where at most {MAX_PIXELS:,} are decoded")


def check_jpeg_size(data: bytes | memoryview) -> None:
    """`check_size` of a JPEG, which its decoders do not do; what is no JPEG they find out themselves.

    Raises:
        UnreadableImage: it is too large.
    """
    position, end = 2, len(data) - 9
    while position < end:
        if data[position] != 0xFF:
            return
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in _SIZES_OF_JPEG:
            height = data[position + 5] << 8 | data[position + 6]
            check_size(data[position + 7] << 8 | data[position + 8], height)
            return
        position += 2 + (data[position + 2] << 8 | data[position + 3])


def extension_of(path: str) -> str:
    """The extension of a file name, in lower case, without its dot and with one spelling per format."""
    extension = path.rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else ""
    return _SAME_EXTENSION.get(extension, extension)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height as the header says them; nothing is decoded, whatever it says.

    Raises:
        UnreadableImage: no image, or one too large to be safe.
    """
    if data.startswith(b"\x93NUMPY"):
        facts = _examine_npy(data)
        return facts.width, facts.height
    with open_image(data) as image:
        width, height = image.size
    return width, height


def examine_image(data: bytes, decode: bool = True) -> ImageFacts:
    """What the image is, from its header; with `decode`, also that all of it can be decoded.

    Raises:
        UnreadableImage: empty, damaged, cut off, of several frames or more channels than are read, of a
            kind that is not supported, or with values that are no numbers.
    """
    if data.startswith(b"\x93NUMPY"):
        return _examine_npy(data)
    with open_image(data) as image:
        facts = _facts(image, data)
        if image.format in _PLUGINS and facts.dtype == "uint8" and max(_depths(data), default=8) > 8:
            raise UnreadableImage(
                f"{image.format} of {max(_depths(data))} bits per channel, which is read as 8; save it as "
                "plain PNG or .npy"
            )
        if facts.dtype == "float32":
            _check_finite(np.asarray(image))
        elif decode:
            # Grey at 1/8 scale: a JPEG's data is read to its end for two thirds of the time.
            image.draft("L", (1, 1))
            image.load()
    return facts


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, ...) as an EXIF orientation from 1 to 8 displays them."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def check_whole(image: Image.Image) -> None:
    """Refuse an image of which only a part would be read: the first page, or some of the channels.

    Raises:
        PartlyRead: with what it holds.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise PartlyRead(f"{frames} frames in one {image.format} file, where one image is expected")
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        samples = tags.get(_SAMPLES, 1) - sum(extra in _ALPHA for extra in tags.get(_EXTRA_SAMPLES, ()))
        read = _SAMPLES_READ.get(image.mode, 1)
        if samples != read:
            raise PartlyRead(f"{samples} channels in a TIFF, of which {read} would be read")
        if image.mode == "L" and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
            raise PartlyRead("8-bit values with a sign in a TIFF, which would be read without it")


def _check_finite(pixels: np.ndarray) -> None:
    wrong = int((~np.isfinite(pixels)).sum())
    if wrong:
        raise UnreadableImage(f"{wrong:,} of {pixels.size:,} values infinite or undefined (NaN)")


@contextmanager
def open_image(data: bytes | Path) -> Iterator[Image.Image]:
    """The image in `data`, or in the file at it, opened; what fails inside the block is an `UnreadableImage`.

    Raises:
        UnreadableImage: empty, damaged, cut off, too large to be safe, or no image.
    """
    if not data:
        raise UnreadableImage("an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(
                io.BytesIO(data) if isinstance(data, bytes) else data, formats=known_formats()
            ) as image:
                check_size(*image.size)
                if isinstance(data, bytes) and isinstance(image, JpegImageFile):
                    image.decodermaxblock = len(data)  # in pieces of 64 kB decoding takes a fifth longer
                yield image
    except Image.UnidentifiedImageError:
        head = data[:64] if isinstance(data, bytes) else data.read_bytes()[:64]
        if (known := _format_of(head)) and known not in Image.OPEN:
            raise UnreadableImage(f"a picture in {known}, which needs {_PLUGINS[known]}") from None
        raise UnreadableImage("bytes of no known image format") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"an image too large to be safe ({error})") from None
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, zlib.error, *_DAMAGES) as error:
        raise UnreadableImage(f"a damaged image ({error})") from None


@contextmanager
def open_map(data: bytes) -> Iterator[Image.Image | np.ndarray]:
    """The file of a map, opened as an image or, where it holds one, as an array.

    Raises:
        UnreadableImage: neither, or damaged.
    """
    if not data.startswith(b"\x93NUMPY"):
        with open_image(data) as image:
            yield image
        return
    yield load_npy(data)


def load_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file.

    Raises:
        UnreadableImage: damaged, or of Python objects.
    """
    try:
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, *_DAMAGES) as error:
        raise UnreadableImage(f"a damaged .npy file ({error})") from None
    return array


def _facts(image: Image.Image, data: bytes) -> ImageFacts:
    check_whole(image)
    channels = _CHANNELS.get(image.mode)
    if channels is None:
        raise UnreadableImage(f"a {image.format} image of mode {image.mode!r}, which is not supported")
    dtype = "float32" if image.mode == "F" else "uint16" if _is_deep(image) else "uint8"
    if dtype == "uint16" and (channels > 1 or image.format == "PNG") and not _is_plain_png(image):
        raise UnreadableImage(f"a {image.format} image of 16 bits per channel; save it as plain PNG or .npy")

    oddities = []
    width, height = image.size
    orientation = _orientation(image, data)
    if orientation > 1:
        oddities.append("rotated")
        if orientation >= 5:
            width, height = height, width
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        oddities.append("alpha")
    if image.mode in ("P", "PA"):
        oddities.append("palette")
    if image.mode == "CMYK":
        oddities.append("cmyk")
    return ImageFacts(
        _STORED_AS[image.format or ""], width, height, channels, dtype, tuple(oddities), orientation
    )


def _orientation(image: Image.Image, data: bytes) -> int:
    """That of EXIF, for which Pillow decodes a PNG to its end: one without EXIF is spared that."""
    if image.format == "PNG" and not any(mark in data for mark in _EXIF_IN_PNG):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _is_deep(image: Image.Image) -> bool:
    """Whether the file holds 16 bits per channel; Pillow opens such colour as 8-bit, only raw modes tell."""
    assert isinstance(image, ImageFile.ImageFile)
    raw_modes = [args if isinstance(args, str) else str(args[0]) for *_, args in image.tile if args]
    if image.mode.startswith("I;16"):
        return True
    return any(";16" in mode and not mode.startswith("BGR") for mode in raw_modes)  # BGR;16 is 5-6-5 bits


def _is_plain_png(image: Image.Image) -> bool:
    return image.format == "PNG" and not image.info.get("interlace")


def _examine_npy(data: bytes) -> ImageFacts:
    array = load_npy(data)
    if array.dtype.name not in _NPY_DTYPES or array.ndim not in (2, 3) or 0 in array.shape:
        raise UnreadableImage(
            f"an array of type {array.dtype.name} and shape {array.shape}, "
            f"where height x width (x channels) of {', '.join(_NPY_DTYPES)} is expected"
        )
    if array.dtype.kind == "f":
        _check_finite(array)
    channels = array.shape[2] if array.ndim == 3 else 1
    return ImageFacts("npy", array.shape[1], array.shape[0], channels, array.dtype.name)
