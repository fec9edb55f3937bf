"""An image on its way into a shard: as it came, or as an array where a reader would see a part of it.

kept as it came      whatever decoders read whole: the bytes are copied
stored as an array   TIFFs of many channels, or of values that decoders do not know; what is to have another
                     depth (`--bits 8`) or fewer channels (`--channels 0,2`)
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl_dist.data.images import ImageFacts, UnreadableImage, examine_image, open_image, upright
from mtl_dist.errors import UserError
from mtl_dist.importers.pixels import encoded_picture

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TYPES = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
_DEEP_FACTOR = 257  # 255 * 257 = 65535


@dataclass(frozen=True)
class Conversion:
    """What becomes of every image; by default nothing.

    Raises:
        UserError: a depth other than 8 and 16, or channels that are no numbers from 0.
    """

    bits: int | None = None
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in _TYPES:
            raise UserError(f"--bits: expected 8 or 16, found {self.bits}.")
        if any(channel < 0 for channel in self.channels):
            raise UserError(f"--channels: expected numbers from 0, found {min(self.channels)}.")

    def __bool__(self) -> bool:
        return self.bits is not None or bool(self.channels)

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """The chosen channels of pixels (H, W, C), in the depth that is wanted.

        Raises:
            UserError: the image lacks a channel, or holds floats, which have no depth.
        """
        if self.channels:
            if max(self.channels) >= pixels.shape[2]:
                raise UserError(
                    f"--channels: expected channels from 0 to {pixels.shape[2] - 1}, which it has, found "
                    f"{max(self.channels)}."
                )
            pixels = pixels[:, :, self.channels]
        if self.bits is None or pixels.dtype == _TYPES[self.bits]:
            return pixels
        if pixels.dtype.kind == "f":
            raise UserError(
                f"--bits {self.bits}: expected integers, found {pixels.dtype} values, which have no depth. "
                "Drop --bits, or convert them yourself."
            )
        if self.bits == 16:
            return pixels.astype(np.uint16) * _DEEP_FACTOR
        return np.rint(pixels / _DEEP_FACTOR).astype(np.uint8)


AS_IT_IS = Conversion()


def stored_image(data: bytes, decode: bool, conversion: Conversion = AS_IT_IS) -> tuple[bytes, ImageFacts]:
    """The bytes that a shard stores of an image, and what they are; with `decode` all of it is decoded.

    Raises:
        UnreadableImage: damaged, or not one picture.
        UserError: it cannot be converted.
    """
    oddities: Sequence[str]
    try:
        facts = examine_image(data, decode and not conversion)
        if not conversion:
            return data, facts
        pixels, orientation, oddities = pixels_of(data, facts), facts.orientation, facts.oddities
    except UnreadableImage:
        if not data.startswith(_TIFF):
            raise
        from mtl_dist.importers.tiff import read_picture

        pixels, orientation = read_picture(data)
        oddities = ("array",) if orientation == 1 else ("array", "rotated")
    converted = conversion.of(upright(pixels, orientation))
    if converted.dtype != pixels.dtype:
        oddities = (*oddities, "converted")
    stored = encoded_picture(converted)
    return stored, replace(
        examine_image(stored, decode=False), oddities=tuple(oddities), orientation=orientation
    )


def pixels_of(data: bytes, facts: ImageFacts) -> np.ndarray:
    """The pixels (H, W, channels) of an image as they are stored, not turned; grey is not repeated.

    Raises:
        UnreadableImage: damaged.
    """
    if facts.extension == "npy":
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        return array.reshape(*array.shape[:2], -1)
    if facts.dtype == "uint16" and facts.channels > 1:
        from mtl_dist.data.decode import decode_image  # torch takes a second to import

        return decode_image(data, facts.channels, "uint16").permute(1, 2, 0).numpy().astype(np.uint16)
    with open_image(data) as image:
        if facts.dtype == "uint8":
            mode = "L" if facts.channels == 1 else "RGB"
            return np.asarray(image if image.mode == mode else image.convert(mode)).reshape(
                *image.size[::-1], -1
            )
        return np.array(image).astype(facts.dtype)[:, :, None]
