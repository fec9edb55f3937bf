"""From pixels to the bytes that a shard stores, where an importer has arrays and not image files.

Small pictures become `.npy`, which a loader copies instead of decoding; larger ones of 8 bits become PNG,
which is a third of the bytes; what PNG cannot hold (16 bits, two or four channels) stays an array.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

SMALL = 1 << 14
"""Bytes of pixels up to which a picture is stored as an array."""


def encoded_picture(pixels: np.ndarray) -> bytes:
    """The file of a picture (H, W) or (H, W, C) of uint8, uint16 or float32."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    is_png = pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2] == 3)
    if is_png and pixels.nbytes > SMALL:
        return encoded_png(pixels)
    return (
        _npy_header(pixels.shape, pixels.dtype.newbyteorder("<").str)
        + np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")).tobytes()
    )


def encoded_png(pixels: np.ndarray) -> bytes:
    """A PNG of pixels (H, W) or (H, W, 3) of uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=64)
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": dtype})
    return buffer.getvalue()
