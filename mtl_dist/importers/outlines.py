"""Regions of an image as annotations draw them, and the mask that they make together.

Polygons are filled as COCO's own tools fill them (`rleFrPoly` of pycocotools), to the pixel. Of regions that
overlap the smaller lies above the larger, so that what stands on a table is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.importers.pixels import encoded_png
from mtl_dist.specs import IGNORE

Edges = tuple[float, float, float, float]
"""Left, top, right and bottom of a box, in pixels from the image's upper left corner."""

_SCALE = 5  # points of an outline per pixel


class Outline(Protocol):
    """What is inside a region."""

    def inside(self, height: int, width: int) -> np.ndarray:
        """Booleans (H, W).

        Raises:
            UserError: it cannot be one of an image of this size.
        """


@dataclass(frozen=True, slots=True)
class Polygons:
    """The union of polygons, each x, y, x, y, ... in pixels."""

    rings: tuple[tuple[float, ...], ...]

    def inside(self, height: int, width: int) -> np.ndarray:
        filled = np.zeros((height, width), bool)
        for ring in self.rings:
            filled |= _filled(ring, height, width)
        return filled

    @property
    def box(self) -> Edges:
        """The rectangle around it."""
        xs = [x for ring in self.rings for x in ring[::2]]
        ys = [y for ring in self.rings for y in ring[1::2]]
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True, slots=True)
class Runs:
    """COCO's run lengths, column by column, outside first: numbers, or a text that packs them."""

    counts: tuple[int, ...] | str
    height: int
    width: int

    def inside(self, height: int, width: int) -> np.ndarray:
        counts = unpacked_counts(self.counts) if isinstance(self.counts, str) else list(self.counts)
        if (self.height, self.width) != (height, width) or sum(counts) != height * width:
            raise UserError(
                f"run lengths: expected {width}x{height} pixels, found {self.width}x{self.height} with "
                f"{sum(counts)} in all."
            )
        flags = np.arange(len(counts)) % 2 == 1
        return np.repeat(flags, counts).reshape(width, height).T


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A box, of which the pixels count whose centres are in it."""

    edges: Edges

    def inside(self, height: int, width: int) -> np.ndarray:
        left, top, right, bottom = self.edges
        x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
        return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]


@dataclass(frozen=True, slots=True)
class Ellipse:
    """An ellipse turned clockwise by degrees, of which the pixels count whose centres are in it."""

    x: float
    y: float
    radius_x: float
    radius_y: float
    degrees: float = 0.0

    def inside(self, height: int, width: int) -> np.ndarray:
        dx = (np.arange(width) + 0.5 - self.x)[None]
        dy = (np.arange(height) + 0.5 - self.y)[:, None]
        angle = math.radians(self.degrees)
        along = dx * math.cos(angle) + dy * math.sin(angle)
        across = dy * math.cos(angle) - dx * math.sin(angle)
        radii = max(self.radius_x, 1e-9), max(self.radius_y, 1e-9)
        found: np.ndarray = (along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1
        return found

    @property
    def box(self) -> Edges:
        """The rectangle around it."""
        angle = math.radians(self.degrees)
        half_x = math.hypot(self.radius_x * math.cos(angle), self.radius_y * math.sin(angle))
        half_y = math.hypot(self.radius_x * math.sin(angle), self.radius_y * math.cos(angle))
        return self.x - half_x, self.y - half_y, self.x + half_x, self.y + half_y


@dataclass(frozen=True, slots=True)
class Bitmap:
    """Pixels one by one, a byte each, of a rectangle whose first one is in row `top`, column `left`."""

    pixels: bytes
    height: int
    width: int
    top: int
    left: int

    def inside(self, height: int, width: int) -> np.ndarray:
        found = np.zeros((height, width), bool)
        rows, columns = np.nonzero(np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width))
        rows, columns = rows + self.top, columns + self.left
        there = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        found[rows[there], columns[there]] = True
        return found

    @property
    def box(self) -> Edges:
        """The rectangle that it is given in."""
        right, bottom = self.left + self.width, self.top + self.height
        return float(self.left), float(self.top), float(right), float(bottom)


@dataclass(frozen=True, slots=True)
class RegionMask:
    """The mask of an image, drawn when it is packed: 0, and the value of each region above it."""

    regions: tuple[tuple[int, Outline], ...]
    height: int
    width: int
    where: str
    size: int = 0

    def read(self) -> bytes:
        """A PNG of values; those of `IGNORE` give way to all others."""
        mask = np.zeros((self.height, self.width), np.uint8)
        try:
            drawn = [(value, outline.inside(self.height, self.width)) for value, outline in self.regions]
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None
        for value, inside in sorted(drawn, key=lambda each: (each[0] != IGNORE, -int(each[1].sum()))):
            mask[inside] = value
        return encoded_png(mask)

    def __str__(self) -> str:
        return f"the mask of {self.where}"


def unpacked_counts(text: str) -> list[int]:
    """The run lengths in COCO's text: six bits a character, differences from the third on.

    Raises:
        UserError: it is no such text.
    """
    counts: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            if at >= len(text) or not 48 <= ord(text[at]) < 48 + 64:
                raise UserError(f"run lengths: expected COCO's text of them, found {text[:20]!r}.")
            bits = ord(text[at]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            shift += 5
            at += 1
            if not more and bits & 0x10:
                value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if value < 0:
            raise UserError(f"run lengths: expected numbers from 0 on, found {value}.")
        counts.append(value)
    return counts


def _filled(ring: Sequence[float], height: int, width: int) -> np.ndarray:
    """What is inside one polygon, as `rleFrPoly` has it: the outline in fifths of a pixel, then per column
    of pixels the rows at which it is crossed.
    """
    points = np.trunc(_SCALE * np.asarray(ring, float).reshape(-1, 2) + 0.5).astype(np.int64)
    along = [_edge(start, end) for start, end in zip(points, np.roll(points, -1, axis=0), strict=True)]
    path = np.concatenate(along)
    before, after = path[:-1], path[1:]
    crossing = before[:, 0] != after[:, 0]
    before, after = before[crossing], after[crossing]
    x = (np.minimum(after[:, 0], before[:, 0]) + 0.5) / _SCALE - 0.5
    # The column between two neighbours is that of the left one.
    y = (np.minimum(after[:, 1], before[:, 1]) + 0.5) / _SCALE - 0.5
    taken = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    rows = np.ceil(np.clip(y[taken], 0, height)).astype(np.int64)
    crossed = np.bincount(x[taken].astype(np.int64) * height + rows, minlength=height * width + 1)
    inside: np.ndarray = (np.cumsum(crossed)[: height * width] % 2 == 1).reshape(width, height).T
    return inside


def _edge(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The whole points on a line from its start to its end, both with it."""
    (dx, dy) = np.abs(end - start)
    main = 0 if dx >= dy else 1
    flipped = start[main] > end[main]
    first, last = (end, start) if flipped else (start, end)
    steps = np.arange(max(dx, dy) + 1)
    if flipped:
        steps = steps[::-1]
    slope = (last[1 - main] - first[1 - main]) / max(dx, dy, 1)
    line = np.empty((len(steps), 2), np.int64)
    line[:, main] = first[main] + steps
    line[:, 1 - main] = np.trunc(first[1 - main] + slope * steps + 0.5)
    return line
