"""From the bytes of an image file to a tensor: 8-bit as uint8, deeper images as float32, in raw values.

The bytes decide the format, never a name. An image comes upright (EXIF orientation is applied),
without alpha (it is dropped, the colours below stay as they are), and in the number of channels asked for:
grey is repeated to three channels, colour is reduced to grey by weights.

torchvision decodes JPEG, faster than Pillow does; simplejpeg, where it is installed, does to the same pixels
in 7% less time. Where TurboJPEG 3 is found, that decodes the part that is shown, see turbojpeg.py.
torchvision does not decode 8-bit PNG here, although it can: on damaged data its PNG decoder ends the process
with a segmentation fault (seen with torchvision 0.29).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import tokenize
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from mtl_dist.data.images import (
    UnreadableImage,
    check_jpeg_size,
    check_size,
    check_whole,
    open_image,
    open_map,
)
from mtl_dist.data.manifest import ImageDtype
from mtl_dist.data.pictures import Box, DecodedPicture, Picture, Resizing
from mtl_dist.data.turbojpeg import Jpeg, find_turbojpeg, is_turned, open_jpeg, version_of

# An optional dependency.
_simplejpeg: Any = importlib.import_module("simplejpeg") if importlib.util.find_spec("simplejpeg") else None

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_NPY = b"\x93NUMPY"
_PNG_BIT_DEPTH, _PNG_COLOUR_TYPE, _PNG_INTERLACED = 24, 25, 28
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_COLOURS = {ImageReadMode.GRAY: "GRAY", ImageReadMode.RGB: "RGB"}
_PLAIN_COLOURS = ("RGB", "YCbCr", "Gray")
_DEPTHS = {torch.uint8: "uint8", torch.uint16: "uint16", torch.float32: "float32"}
_ORIENTATION = 0x0112
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG has it


Bytes = bytes | memoryview


def decode_image(data: Bytes, channels: int, dtype: ImageDtype = "uint8") -> Tensor:
    """The image as (channels, H, W), uint8 for a dataset of "uint8" images, else float32.

    Raises:
        UnreadableImage: damaged, of an unknown format, not of `dtype`, or of channels that cannot be turned
            into `channels`.
    """
    head = bytes(data[: _PNG_BIT_DEPTH + 1])
    if head.startswith(_JPEG):
        check_jpeg_size(data)
        image = _decode_jpeg(data, _MODES.get(channels, ImageReadMode.UNCHANGED))
    elif head.startswith(_NPY):
        image = _decode_npy(data)
    elif head.startswith(_PNG) and head[_PNG_BIT_DEPTH:] == b"\x10":
        image = _decode_deep_png(data, _MODES.get(channels, ImageReadMode.UNCHANGED))
    else:
        image = _decode_by_pillow(data)
    if not image.numel():
        raise UnreadableImage(f"an image of shape {tuple(image.shape)}, which has no pixel")
    if _DEPTHS[image.dtype] != dtype:
        raise UnreadableImage(f"an image of {_DEPTHS[image.dtype]} values, where {dtype} is expected")
    return _with_channels(image if dtype == "uint8" else image.float(), channels)


def open_picture(data: memoryview, channels: int, dtype: ImageDtype = "uint8") -> Picture:
    """The image as a picture, which decodes no more of a JPEG than it shows, where TurboJPEG 3 is found.

    Raises:
        UnreadableImage: as `decode_image`.
    """
    if dtype == "uint8" and data[:3] == _JPEG:
        check_jpeg_size(data)
        jpeg = open_jpeg(data, channels)
        if jpeg is not None:
            return _JpegPicture(jpeg)
    return DecodedPicture(decode_image(data, channels, dtype))


@dataclass(frozen=True)
class _JpegPicture(Picture):
    jpeg: Jpeg

    @property
    def size(self) -> tuple[int, int]:
        return self.jpeg.size

    def decode(self, box: Box, size: tuple[int, int]) -> Resizing:
        resizing = self.jpeg.decode(box, size)
        if resizing is None:
            return DecodedPicture(decode_image(self.jpeg.data, self.jpeg.channels)).decode(box, size)
        return resizing


def decoder_name() -> str:
    """What decodes the JPEGs of this process, for the record of a run: its pictures may depend on it."""
    turbojpeg = find_turbojpeg()
    if turbojpeg is not None:
        return f"TurboJPEG {version_of(turbojpeg)}"
    return "torchvision" if _simplejpeg is None else f"simplejpeg {_simplejpeg.__version__}"


def decode_map(data: Bytes) -> np.ndarray:
    """The numbers of a stored map: (H, W) of a grey PNG of 8 or 16 bits, (H, W, 3) of an 8-bit colour PNG, or
    as an array in .npy has them.

    Raises:
        UnreadableImage: damaged, or anything else.
    """
    with open_map(bytes(data)) as opened:
        if isinstance(opened, np.ndarray):
            return opened
        if opened.format != "PNG" or opened.mode not in ("L", "I;16", "RGB"):
            raise UnreadableImage(
                f"a {opened.format} mask of mode {opened.mode}, where an 8-bit grey PNG is expected"
            )
        return np.array(opened)


def _decode_jpeg(data: Bytes, mode: ImageReadMode) -> Tensor:
    plain = _decode_plain_jpeg(data, _COLOURS.get(mode))
    if plain is not None:
        return plain
    try:
        image: Tensor = decode_jpeg(_as_tensor(data), mode, apply_exif_orientation=True)
    except RuntimeError as error:
        raise UnreadableImage(f"a damaged JPEG ({_reason(error)})") from None
    return image


def _decode_plain_jpeg(data: Bytes, colours: str | None) -> Tensor | None:
    """The image by simplejpeg; nothing where that is absent or warns, or the image is turned or CMYK."""
    if _simplejpeg is None or colours is None or is_turned(memoryview(data)):
        return None
    try:
        if _simplejpeg.decode_jpeg_header(data)[2] not in _PLAIN_COLOURS:
            return None
        return torch.from_numpy(_simplejpeg.decode_jpeg(data, colours)).permute(2, 0, 1)
    except ValueError:
        return None


def _decode_npy(data: Bytes) -> Tensor:
    try:
        # The header's length is 2 bytes in version 1 of the format, 4 bytes in the later ones.
        begin = 10 if data[6] == 1 else 12
        begin += int.from_bytes(data[8:begin], "little")
        shape, transposed, dtype = npy_header(bytes(data[:begin]))
        array = np.frombuffer(data, dtype, math.prod(shape), begin).reshape(
            shape, order="F" if transposed else "C"
        )
    except (ValueError, EOFError, IndexError, OverflowError) as error:
        raise UnreadableImage(f"a damaged .npy file ({error})") from None
    if array.dtype.name not in _DEPTHS.values() or array.ndim not in (2, 3):
        raise UnreadableImage(f"an array of {array.dtype.name} {array.shape}, where an image is expected")
    return _channels_first(array.astype(array.dtype.newbyteorder("=")))


@lru_cache(maxsize=64)
def npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is transposed, and dtype: cached, because to parse it takes 20 times reading it."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, transposed, dtype = read(file)
    except (SyntaxError, tokenize.TokenError) as error:  # numpy tries to correct headers of Python 2
        raise ValueError(str(error)) from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, transposed, dtype


def _decode_deep_png(data: Bytes, mode: ImageReadMode) -> Tensor:
    """A 16-bit PNG. Pillow would halve the depth of a colour image."""
    _check_png(data)
    try:
        image: Tensor = decode_png(_as_tensor(data), mode, apply_exif_orientation=True)
    except RuntimeError as error:
        raise UnreadableImage(f"a damaged PNG ({_reason(error)})") from None
    return image


def _check_png(data: Bytes) -> None:
    """Refuse 16-bit PNG data on which torchvision's decoder would end the process."""
    if len(data) <= _PNG_INTERLACED:
        raise UnreadableImage("a damaged PNG (it ends within its header)")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    check_size(width, height)
    stride = 1 + 2 * width * _PNG_CHANNELS.get(data[_PNG_COLOUR_TYPE], 0)
    pixels, position = [], len(_PNG)
    try:
        while position < len(data):
            size = int.from_bytes(data[position : position + 4], "big")
            kind, end = bytes(data[position + 4 : position + 8]), position + 8 + size
            if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise UnreadableImage(f"a damaged PNG (the checksum of {kind!r} is wrong)")
            if kind == b"IDAT":
                pixels.append(data[position + 8 : end])
            position = end + 4
        rows = zlib.decompressobj().decompress(b"".join(pixels), height * stride + 1)
    except zlib.error as error:
        raise UnreadableImage(f"a damaged PNG ({error})") from None
    if data[_PNG_INTERLACED] or len(rows) != height * stride or max(rows[::stride], default=0) > 4:
        raise UnreadableImage("an interlaced or damaged 16-bit PNG")


def _decode_by_pillow(data: Bytes) -> Tensor:
    with open_image(bytes(data)) as opened:
        check_whole(opened)
        image: Image.Image = opened
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return _channels_first(np.array(image).astype(np.uint16))
        if image.mode in ("1", "LA", "La"):
            image = image.convert("L")
        elif image.mode not in ("L", "F", "RGB"):
            image = image.convert("RGB")
        return _channels_first(np.array(image))


def _channels_first(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def _as_tensor(data: Bytes) -> Tensor:
    """The bytes as a tensor; what torch may not write to (it warns of that) is copied."""
    writable = isinstance(data, memoryview) and not data.readonly
    return torch.frombuffer(data if writable else bytearray(data), dtype=torch.uint8)


def _reason(error: RuntimeError) -> str:
    """What the decoder says, without where in torchvision it says it."""
    return str(error).splitlines()[0].rpartition(".cpp:")[2].partition(", ")[2] or str(error).splitlines()[0]


def _with_channels(image_CHW: Tensor, channels: int) -> Tensor:
    found = len(image_CHW)
    if found == channels:
        return image_CHW
    if found == 1 and channels == 3:
        return image_CHW.expand(channels, -1, -1)
    if found == 3 and channels == 1:
        grey = torch.tensordot(torch.tensor(_GREY), image_CHW.float(), dims=1)[None]
        return grey.round_().to(torch.uint8) if image_CHW.dtype == torch.uint8 else grey
    raise UnreadableImage(f"an image of {found} channels, where {channels} are expected")
