"""An image and its maps, turned, shifted, enlarged and sheared together, and the way they went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtl_dist.lazy import vision
from mtl_dist.specs import IGNORE

if TYPE_CHECKING:
    from torch import Tensor


class Affine(NamedTuple):
    """An affine map of points: x' = a x + b y + c, y' = d x + e y + f; a pixel's centre is at .5."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def then(self, more: Affine) -> Affine:
        """This way, and then the other."""
        a, b, c, d, e, f = self
        return Affine(
            more.a * a + more.b * d,
            more.a * b + more.b * e,
            more.a * c + more.b * f + more.c,
            more.d * a + more.e * d,
            more.d * b + more.e * e,
            more.d * c + more.e * f + more.f,
        )

    def flipped(self, axis: int, size: tuple[int, int]) -> Affine:
        """With left and right (axis -1) or top and bottom (-2) changed, in an image of `size`."""
        height, width = size
        across = (
            Affine(-1.0, 0.0, width, 0.0, 1.0, 0.0)
            if axis == -1
            else Affine(1.0, 0.0, 0.0, 0.0, -1.0, height)
        )
        return self.then(across)

    @property
    def enlargement(self) -> float:
        """By how much areas grow."""
        return abs(self.a * self.e - self.b * self.d)

    @property
    def matrix(self) -> np.ndarray:
        """As (2, 3)."""
        return np.array([self[:3], self[3:]])


def turned(
    size: tuple[int, int], angle: float, shift: Sequence[float], zoom: float, shear: Sequence[float]
) -> Affine:
    """What torchvision's `affine` does to the points of an image of `size`: clockwise degrees, about the
    centre; the shift and the shear of x, then of y."""
    rotation, shear_x, shear_y = math.radians(angle), math.radians(shear[0]), math.radians(shear[1])
    skewed = rotation - shear_y
    a = zoom * math.cos(skewed) / math.cos(shear_y)
    b = zoom * (-math.cos(skewed) * math.tan(shear_x) / math.cos(shear_y) - math.sin(rotation))
    d = zoom * math.sin(skewed) / math.cos(shear_y)
    e = zoom * (-math.sin(skewed) * math.tan(shear_x) / math.cos(shear_y) + math.cos(rotation))
    x, y = size[1] / 2, size[0] / 2
    return Affine(a, b, x + shift[0] - a * x - b * y, d, e, y + shift[1] - d * x - e * y)


@dataclass
class Moving:
    """An image (C, H, W), its maps (C, H, W) and boxes of one size, and how they came here.

    `fills` is what each task's map says where there is no label; a mask's 255 where it is not stated.
    """

    image_CHW: Tensor
    maps: dict[str, Tensor]
    fills: Mapping[str, float]
    path: Affine

    def move(self, angle: float, shift: Sequence[float], zoom: float, shear: Sequence[float]) -> None:
        """Move all of it; the image is interpolated, a map takes the nearest pixel's value."""
        affine, modes = vision.functional.affine, vision.InterpolationMode
        where = (angle, list(shift), zoom, list(shear))
        self.image_CHW = affine(self.image_CHW, *where, modes.BILINEAR, [0])
        self.maps = {
            name: affine(pixels, *where, modes.NEAREST, [self.fills.get(name, IGNORE)])
            for name, pixels in self.maps.items()
        }
        self.path = self.path.then(turned((self.image_CHW.shape[-2], self.image_CHW.shape[-1]), *where))
