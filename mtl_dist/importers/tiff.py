"""Frames of a multi-page TIFF, read one at a time: 8 or 16 bits, grey or several channels.

A stack has one axis of frames (time, depth, or just pages); channels may be pages of their own, planes of a
page, or samples of a pixel. Which it is says the file: OME, ImageJ or plain TIFF (through tifffile).
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from mtl_dist.data.images import UnreadableImage, check_pixels, check_size
from mtl_dist.errors import UserError
from mtl_dist.importers.pixels import encoded_picture, encoded_png
from mtl_dist.importers.sources import Source
from mtl_dist.specs import IGNORE

Bounds = tuple[tuple[float, float], ...]
"""Per channel, the value that becomes 0 and the one that becomes 255."""

_PLANE, _CHANNELS = frozenset("YX"), frozenset("CS")
_LEAST = 1e-12  # so that percentile 0 is the least value there is, not 0
_GREY_OR_RGB = (
    tifffile.PHOTOMETRIC.MINISBLACK,
    tifffile.PHOTOMETRIC.MINISWHITE,
    tifffile.PHOTOMETRIC.RGB,
)
_DTYPES = ("bool", "uint8", "uint16")
_DAMAGES = (
    tifffile.TiffFileError,
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)


class Stack:
    """One open stack: `num_frames` frames of `dtype`.

    Raises:
        UserError: no TIFF, a damaged one, or one whose axes, size or values are not those of a stack.
    """

    def __init__(self, source: Source) -> None:
        self._where = str(source)
        with _damage_reported(self._where):
            file = io.BytesIO(source.read()) if source.archive else Path(source.path)
            self._file = tifffile.TiffFile(file)
            series = list(self._file.series)  # of later releases they are found when they are asked for
        if len(series) != 1:
            found = "; ".join(f"{'x'.join(map(str, one.shape))} {one.dtype}" for one in series[:5])
            raise UserError(f"{source}: expected pages of one size and kind, found several: {found}.")
        self._series: Any = series[0]
        page = self._series.keyframe
        self._page_axes: str = page.axes
        self._outer = self._series.axes[: -len(page.axes)]
        self._outer_shape = tuple(self._series.shape[: -len(page.axes)])
        lengths = dict(zip(self._outer, self._outer_shape, strict=True))
        frames = [axis for axis in self._outer if axis not in _CHANNELS]
        long = [axis for axis in frames if lengths[axis] > 1]
        plain = self._series.axes.endswith(page.axes) and len(lengths) == len(self._outer)
        if not plain or len(long) > 1 or set(page.axes) - _PLANE - _CHANNELS or not set(page.axes) >= _PLANE:
            shape = "x".join(map(str, self._series.shape))
            raise UserError(
                f"{source}: expected one axis of frames, and perhaps one of channels, found the axes "
                f"{self._series.axes} ({shape}). Save it as a stack of frames."
            )
        try:
            check_size(page.imagewidth, page.imagelength)
        except UnreadableImage as error:
            raise UserError(f"{source}: expected pages that can be decoded, found {error}.") from None
        if self._series.dtype.name not in _DTYPES:
            raise UserError(
                f"{source}: expected 8 or 16 bits without sign per value, found {self._series.dtype.name}. "
                "Convert it."
            )
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise UserError(f"{source}: expected greys or colours, found a palette. Convert it to grey.")
        self._frame_axis = long[0] if long else ""
        self.num_frames = lengths[long[0]] if long else 1
        self.dtype: np.dtype[Any] = self._series.dtype

    def frame(self, number: int) -> np.ndarray:
        """The frame (H, W, C); what is one bit per pixel comes as uint8 of 0 and 1.

        Raises:
            UserError: it cannot be read.
        """
        grid = [
            (number,) if axis == self._frame_axis else range(size)
            for axis, size in zip(self._outer, self._outer_shape, strict=True)
        ]
        planes = []
        with _damage_reported(f"{self._where} page {number}"):
            for index in itertools.product(*grid):
                at = int(np.ravel_multi_index(index, self._outer_shape)) if index else 0
                planes.append(_channels_last(self._series.pages[at].asarray(), self._page_axes))
        pixels = np.concatenate(planes, axis=2)
        return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


@dataclass(frozen=True, slots=True)
class StackPage:
    """One frame of a stack as the file of a picture, or of a mask; `size` is that of its pixels.

    `bounds` make 8 bits of what lies between them.
    """

    source: Source
    frame: int
    size: int
    bounds: Bounds | None = None
    is_mask: bool = False

    def __str__(self) -> str:
        return f"{self.source} page {self.frame}"

    def read(self) -> bytes:
        """The PNG or .npy file of the frame.

        Raises:
            UserError: it cannot be read, or is a mask of several channels or of values beyond 255.
        """
        pixels = open_stack(self.source).frame(self.frame)
        if not self.is_mask:
            return encoded_picture(pixels if self.bounds is None else scaled(pixels, self.bounds))
        if pixels.shape[2] != 1 or pixels.max(initial=0) > IGNORE:
            raise UserError(
                f"{self}: expected a mask of one channel with values up to {IGNORE}, found "
                f"{pixels.shape[2]} channel(s) and values up to {pixels.max(initial=0)}."
            )
        return encoded_png(pixels[:, :, 0].astype(np.uint8))


def open_stack(source: Source) -> Stack:
    """The stack in a file, open; of each process's last few."""
    opened = _held_in_memory if source.archive else _opened
    return opened(source, os.getpid())


@lru_cache(maxsize=64)  # records are packed in a random order, and to open a stack reads all its directories
def _opened(source: Source, process: int) -> Stack:
    return Stack(source)


@lru_cache(maxsize=4)
def _held_in_memory(source: Source, process: int) -> Stack:
    return Stack(source)


def percentiles(source: Source, frames: list[int], low: float, high: float) -> Bounds:
    """Two percentiles of the values of each channel, over these frames of a stack, one frame at a time."""
    counts: np.ndarray | None = None
    stack = open_stack(source)
    for number in frames:
        pixels = stack.frame(number)
        values = 2 ** (8 * pixels.dtype.itemsize)
        found = np.stack(
            [
                np.bincount(pixels[:, :, channel].ravel(), minlength=values)
                for channel in range(pixels.shape[2])
            ]
        )
        counts = found if counts is None else counts + found
    assert counts is not None
    bounds = []
    for of_channel in counts:
        shares = np.cumsum(of_channel) / of_channel.sum()
        bottom, top = (float(np.searchsorted(shares, max(share / 100, _LEAST))) for share in (low, high))
        bounds.append((bottom, max(top, bottom + 1)))
    return tuple(bounds)


def scaled(pixels: np.ndarray, bounds: Bounds) -> np.ndarray:
    """The frame (H, W, C) in 8 bits: what lies between a channel's bounds becomes 0 to 255."""
    low, high = np.array(bounds, np.float32).T
    return np.clip(np.rint((pixels - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def _channels_last(pixels: np.ndarray, axes: str) -> np.ndarray:
    order = [axes.index("Y"), axes.index("X"), *(i for i, axis in enumerate(axes) if axis not in _PLANE)]
    pixels = pixels.transpose(order)
    return pixels.reshape(*pixels.shape[:2], -1)


def has_pages(data: bytes) -> bool:
    """Whether a TIFF has several pages; not so where it is damaged, which its importer will say."""
    with _heard(), suppress(*_DAMAGES), tifffile.TiffFile(io.BytesIO(data)) as file:
        return len(file.pages) > 1
    return False


def read_picture(data: bytes) -> tuple[np.ndarray, int]:
    """The one picture in a TIFF, (H, W, C) with all its channels, as stored, and its EXIF orientation.

    The values are uint8, uint16 or float32: other integers must fit into float32 exactly.

    Raises:
        UnreadableImage: damaged, of several pages, or of colours or values that are not supported; with the
            axes that were found.
    """
    try:
        with _heard() as said, tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series
            if len(series) != 1:
                found = "; ".join(f"{_described(one)} {one.dtype}" for one in series[:5])
                raise UnreadableImage(f"a TIFF of {len(series)} different pictures ({found})")
            page: Any = series[0].keyframe
            check_pixels(math.prod(series[0].shape) // max(1, page.samplesperpixel))
            pixels, axes = series[0].asarray(), series[0].axes
    except _DAMAGES as error:
        raise UnreadableImage(f"a damaged TIFF ({_words(error)})") from None
    if said.line:
        raise UnreadableImage(f"a damaged TIFF ({said.line})")
    long = "".join(axis for axis, size in zip(axes, pixels.shape, strict=True) if size > 1 or axis in _PLANE)
    if set(long) - _PLANE - _CHANNELS or not set(long) >= _PLANE or len(set(long)) < len(long):
        raise UnreadableImage(
            f"a TIFF with the axes {_described(series[0])}, where rows, columns and channels (Y, X, C or S) "
            "of one picture are expected; `mtl prepare stacks` makes a sample of each page"
        )
    if page.photometric not in _GREY_OR_RGB:
        raise UnreadableImage(f"a TIFF in {page.photometric.name}, where greys or RGB are expected")
    kept = tuple(size for axis, size in zip(axes, pixels.shape, strict=True) if axis in long)
    pixels = _channels_last(_of_known_type(pixels.reshape(kept)), long)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind == "u":
        pixels = np.iinfo(pixels.dtype).max - pixels
    orientation = page.tags.get("Orientation")
    return pixels, 1 if orientation is None else int(orientation.value)


def _of_known_type(pixels: np.ndarray) -> np.ndarray:
    """The values as one of the types that are stored."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.astype(pixels.dtype.newbyteorder("="))
    converted = pixels.astype(np.float32)
    if pixels.dtype.kind in "iu" and (converted.astype(np.float64) != pixels).any():
        raise UnreadableImage(f"a TIFF of {pixels.dtype} values too large for float32")
    if pixels.dtype.kind not in "iuf":
        raise UnreadableImage(f"a TIFF of {pixels.dtype} values, where real numbers are expected")
    return converted


def _described(series: Any) -> str:
    return f"{series.axes} ({'x'.join(map(str, series.shape))})"


@contextmanager
def _heard() -> Iterator[_Said]:
    """What tifffile complains of inside the block: of what a damaged file lacks it only tells its log."""
    said = _Said()
    logger = logging.getLogger("tifffile")
    before, logger.propagate = logger.propagate, False
    logger.addHandler(said)
    try:
        yield said
    finally:
        logger.propagate = before
        logger.removeHandler(said)


@contextmanager
def _damage_reported(where: str) -> Iterator[None]:
    """Turn what tifffile raises, and what it only logs, into an error for the user."""
    with _heard() as said:
        try:
            yield
        except UserError:
            raise
        except _DAMAGES as error:
            raise UserError(f"{where}: expected a readable TIFF, found: {_words(error)}.") from None
    if said.line:
        raise UserError(f"{where}: expected a whole TIFF, found: {said.line}. Copy it again.")


def _words(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    advice = '. Install it with `pip install "mtl-dist[tiff]"`' if "imagecodecs" in text else ""
    return f"{text}{advice}"


class _Said(logging.Handler):
    """Keeps the first complaint."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.line = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.line = self.line or record.getMessage().splitlines()[0]
