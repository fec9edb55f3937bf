"""The part of a JPEG under a crop, decoded by TurboJPEG 3 where that library is found.

An ordinary decoder decodes the whole image, of which a random crop then throws away half. TurboJPEG 3 can
decode the rows and the columns of blocks (MCUs) under the crop alone, and at 1/2, 1/4 or 1/8 of the size
where the crop is shown at half of that or less. At full size the pixels are those of the whole image, bit for
bit with the same version of the library. A smaller one is filtered differently: photographs of 500x375
shown at 32x32 differ by 0.4 grey levels on average, and none of 120 by more than 1.1.

Whatever is unusual is left to the ordinary decoder: rotated images, CMYK, more than 8 bits, and anything at
which the library warns. What it never sees is damage outside the crop.

The library is taken from MTL_TURBOJPEG (its path; empty: none), else from the Python package `turbojpeg`,
which carries it, else from the system. Versions before 3 cannot crop and are passed over.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtl_dist.data.pictures import Box, Resizing, resized
from mtl_dist.errors import UserError

VARIABLE = "MTL_TURBOJPEG"

# turbojpeg.h
_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLOUR_SPACE, _LOSSLESS = 4, 5, 6, 7, 8, 15
_PIXEL_FORMATS = {1: 6, 3: 0}  # channels: grey, RGB
_MCU_SIZES = ((8, 8), (16, 8), (16, 16), (8, 8), (8, 16), (32, 8), (8, 32))  # (width, height) by subsampling
_PLAIN_COLOUR_SPACES = (0, 1, 2)  # RGB, YCbCr, grey
_SCALES = (8, 4, 2)  # 1/8 .. 1/2 have fast inverse transforms; those between are as slow as the whole size
_OVERSAMPLING = 2  # scaled pixels per shown one, in each direction, that leave the picture as it was

_SYSTEM = ("libturbojpeg.so.0", "libturbojpeg.dylib")
_ORIENTATION = 0x0112


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num", "denom")]


class TurboJpeg:
    """The library, and an instance of its decoder for every thread."""

    def __init__(self, path: str) -> None:
        """Load it.

        Raises:
            OSError: there is no such library.
            AttributeError: it is a version without region decoding.
        """
        library = ctypes.CDLL(path)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for name, result, arguments in (
            ("tj3Init", pointer, (number,)),
            ("tj3Destroy", None, (pointer,)),
            ("tj3Get", number, (pointer, number)),
            ("tj3DecompressHeader", number, (pointer, pointer, size)),
            ("tj3SetScalingFactor", number, (pointer, _Factor)),
            ("tj3SetCroppingRegion", number, (pointer, _Region)),
            ("tj3Decompress8", number, (pointer, pointer, size, pointer, number, number)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.library = library
        self.path = path
        self._instances = threading.local()

    @property
    def instance(self) -> int:
        """This thread's decoder."""
        if not hasattr(self._instances, "decoder"):
            self._instances.decoder = self.library.tj3Init(_DECOMPRESS)
        decoder: int = self._instances.decoder
        return decoder

    def discard_instance(self) -> None:
        """Have a new decoder next time: one that failed goes on failing, whatever comes next."""
        self.library.tj3Destroy(self._instances.decoder)
        del self._instances.decoder


@lru_cache(maxsize=1)
def find_turbojpeg() -> TurboJpeg | None:
    """The library, or nothing if it is not there.

    Raises:
        UserError: MTL_TURBOJPEG names something else.
    """
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    for path in [named] if named else [*_in_package(), *_SYSTEM]:
        try:
            return TurboJpeg(path)
        except (OSError, AttributeError) as error:
            if named:
                raise UserError(
                    f"{VARIABLE}: expected the path of a TurboJPEG 3 library, found {named!r} ({error}). "
                    "Fix it, or remove it."
                ) from None
    return None


def version_of(turbojpeg: TurboJpeg) -> str:
    """The version that the library's file states; only its text has it, there is no function for it."""
    # What a bare name stands for, only the dynamic linker knows.
    mapped = Path("/proc/self/maps").read_text() if not os.path.isabs(turbojpeg.path) else ""
    found = re.search(rf"(/\S*{re.escape(Path(turbojpeg.path).stem)}\S*)", mapped)
    path = Path(found.group(1) if found else turbojpeg.path)
    stated = re.search(rb"libjpeg-turbo version ([\w.]+)", path.read_bytes()) if path.is_file() else None
    return stated.group(1).decode() if stated else "of unknown version"


def _in_package() -> Iterator[str]:
    """The library inside the wheel `turbojpeg`, if that is installed."""
    found = importlib.util.find_spec("turbojpeg")
    if found is not None and found.origin is not None:
        yield from map(str, sorted(Path(found.origin).parent.glob("turbojpeg.libs/libturbojpeg*")))


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose header was read."""

    turbojpeg: TurboJpeg
    data: memoryview
    address: int
    channels: int
    size: tuple[int, int]
    mcu_size: tuple[int, int]

    def decode(self, box: Box, size: tuple[int, int]) -> Resizing | None:
        """Decode what lies in the box, to be resized to (C, *size); nothing where the decoder warns.

        As `Picture.decode`, but for what is left to the ordinary decoder.
        """
        smallest = min(box.height / size[0], box.width / size[1]) / _OVERSAMPLING
        scale = next((scale for scale in _SCALES if scale <= smallest), 1)
        region = self._region(box, scale)
        pixels_HWC = self._decoded(region, scale)
        if pixels_HWC is None:
            return None
        if scale == 1:
            inside = Box(box.top - region.top, box.left - region.left, box.height, box.width)
            return partial(resized, inside.of(pixels_HWC.permute(2, 0, 1)), size, "bilinear")
        top, left = box.top / scale - region.top, box.left / scale - region.left
        bottom = min(top + box.height / scale, region.height)
        right = min(left + box.width / scale, region.width)
        return partial(_resized_between, pixels_HWC, (left, top, right, bottom), size)

    def _region(self, box: Box, scale: int) -> Box:
        """The blocks under the box, in pixels of the image at 1/scale.

        One pixel more on every side: colour is interpolated between neighbours.
        """
        height, width = (-(-side // scale) for side in self.size)
        step = self.mcu_size[0] // scale
        top = max(box.top // scale - 1, 0)
        left = max(box.left // scale - 1, 0) // step * step
        bottom = min(-(-(box.top + box.height) // scale) + 1, height)
        right = min((-(-(box.left + box.width) // scale) // step + 1) * step, width)
        if right - left < step:
            # The image's last block, cut off: of two columns of colour the library makes a coarser picture.
            left = max(left - step, 0)
        return Box(top, left, bottom - top, right - left)

    def _decoded(self, region: Box, scale: int) -> Tensor | None:
        library, instance = self.turbojpeg.library, self.turbojpeg.instance
        pixels_HWC = torch.empty(region.height, region.width, self.channels, dtype=torch.uint8)
        whole = (region.height, region.width) == tuple(-(-side // scale) for side in self.size)
        file, pixel_format = (self.address, len(self.data)), _PIXEL_FORMATS[self.channels]
        cut = _Region() if whole else _Region(region.left, region.top, region.width, region.height)
        failed = (
            # The region is in scaled pixels, and an earlier one must not be judged by the new scale.
            library.tj3SetCroppingRegion(instance, _Region())
            or library.tj3DecompressHeader(instance, *file)
            or library.tj3SetScalingFactor(instance, _Factor(1, scale))
            or library.tj3SetCroppingRegion(instance, cut)
            or library.tj3Decompress8(instance, *file, pixels_HWC.data_ptr(), 0, pixel_format)
        )
        if failed:
            self.turbojpeg.discard_instance()
            return None
        return pixels_HWC


def open_jpeg(data: memoryview, channels: int) -> Jpeg | None:
    """The JPEG in `data`; nothing where the ordinary decoder is to decide."""
    turbojpeg = find_turbojpeg()
    if turbojpeg is None or channels not in _PIXEL_FORMATS or is_turned(data):
        return None
    library, instance = turbojpeg.library, turbojpeg.instance
    address = _address(data)
    if library.tj3DecompressHeader(instance, address, len(data)):
        turbojpeg.discard_instance()
        return None
    subsampling = library.tj3Get(instance, _SUBSAMPLING)
    if (
        library.tj3Get(instance, _PRECISION) != 8
        or library.tj3Get(instance, _LOSSLESS) != 0
        or library.tj3Get(instance, _COLOUR_SPACE) not in _PLAIN_COLOUR_SPACES
        or not 0 <= subsampling < len(_MCU_SIZES)
    ):
        return None
    size = library.tj3Get(instance, _HEIGHT), library.tj3Get(instance, _WIDTH)
    return Jpeg(turbojpeg, data, address, channels, size, _MCU_SIZES[subsampling])


def _resized_between(
    pixels_HWC: Tensor, edges: tuple[float, float, float, float], size: tuple[int, int]
) -> Tensor:
    """What lies within edges (left, top, right, bottom) between pixels, as (C, *size).

    Only Pillow can do that; it would look beyond the edges too.
    """
    left, top, right, bottom = edges
    rows, columns = slice(int(top), math.ceil(bottom)), slice(int(left), math.ceil(right))
    pixels, channels = pixels_HWC[rows, columns].numpy(), pixels_HWC.shape[2]
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    corners = (left - columns.start, top - rows.start, right - columns.start, bottom - rows.start)
    image = image.resize(size[::-1], Image.Resampling.BILINEAR, corners)
    shown = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return shown.view(*size, channels).permute(2, 0, 1)


def _address(data: memoryview) -> int:
    if not data.readonly:  # in a fifth of the time
        return ctypes.addressof(ctypes.c_char.from_buffer(data))
    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return address


def is_turned(data: memoryview) -> bool:
    """Whether EXIF data says, or may say, that the image is not upright."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and 0xE0 <= data[at + 1] <= 0xEF:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and bytes(data[at + 4 : at + 10]) == b"Exif\0\0":
            return _orientation(bytes(data[at + 10 : at + 2 + size])) != 1
        at += 2 + size
    return False


def _orientation(tiff: bytes) -> int:
    """The orientation in EXIF data: 1 for upright or unsaid, 0 for what cannot be read."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 0
    try:
        (begin,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, begin)
        for number in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, begin + 2 + 12 * number)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        return 0
    return 1
