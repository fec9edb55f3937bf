"""What can be measured on a picture of strokes (bright ink on dark paper), as labels to learn.

thickness   the mean width of the strokes, in pixels of the picture
slant       how far the strokes lean: degrees from upright, to the right above 0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mtl_dist.errors import UserError

INK = 128
"""Grey values from here on are ink."""

ENLARGED = 2
"""How much a picture is enlarged before its strokes are measured: one of 28x28 has strokes of 2 pixels."""


@dataclass(frozen=True)
class Measure:
    """One quantity: its unit, and its value for a picture (H, W) of 8-bit greys."""

    unit: str
    of: Callable[[np.ndarray], float]


def thickness(picture: np.ndarray) -> float:
    """The mean width of the strokes in a picture (H, W), in its pixels, measured on it enlarged."""
    large = enlarged(picture, ENLARGED)
    return round(stroke_width(large >= INK) / ENLARGED, 4)


def slant(picture: np.ndarray) -> float:
    """The angle between the strokes' axis and upright in degrees, from the second moments of the ink.

    A shear by the tangent of this angle makes the covariance of x and y vanish, which is how handwriting is
    deslanted. A picture without ink, or with ink in one row, stands upright.
    """
    weight = picture.astype(float)
    total = weight.sum()
    if total == 0:
        return 0.0
    y, x = np.arange(picture.shape[0])[:, None], np.arange(picture.shape[1])[None]
    y = y - (weight * y).sum() / total
    x = x - (weight * x).sum() / total
    return round(math.degrees(math.atan2(-(weight * x * y).sum(), (weight * y * y).sum())), 3)


MEASURES = {"thickness": Measure("px", thickness), "slant": Measure("degrees", slant)}


def stroke_width(ink: np.ndarray) -> float:
    """The mean width of the strokes in a boolean picture (H, W), in its pixels: ink area / skeleton length.

    The skeleton is Zhang and Suen's, one pixel wide. Its length is that of the steps between neighbouring
    pixels: 1 along a row or a column, the root of 2 along a diagonal, where no two straight steps join the
    same pixels. A dot has length 1. Strokes that touch count as one wide stroke.
    """
    from skimage.morphology import skeletonize

    line = skeletonize(np.ascontiguousarray(ink))  # an old scikit-image takes no transposed one
    straight = (line[:, 1:] & line[:, :-1]).sum() + (line[1:] & line[:-1]).sum()
    falling = line[1:, 1:] & line[:-1, :-1] & ~line[1:, :-1] & ~line[:-1, 1:]
    rising = line[1:, :-1] & line[:-1, 1:] & ~line[1:, 1:] & ~line[:-1, :-1]
    length = float(straight + math.sqrt(2) * (falling.sum() + rising.sum()))
    return float(ink.sum()) / max(length, 1.0)


def enlarged(picture: np.ndarray, factor: int) -> np.ndarray:
    """A picture (H, W), `factor` times as high and wide, by bicubic interpolation."""
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def require_measures(names: tuple[str, ...]) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: an unknown name, one that appears twice, or scikit-image is missing.
    """
    for name in names:
        if name not in MEASURES or names.count(name) > 1:
            raise UserError(f"--measure: expected some of {', '.join(MEASURES)}, found {', '.join(names)}.")
    if "thickness" in names:
        try:
            import skimage.morphology  # noqa: F401 (used by `stroke_width`)
        except ImportError:
            raise UserError(
                "--measure thickness: expected scikit-image, found none. "
                'Install it with `pip install "mtl-dist[demo]"`.'
            ) from None
