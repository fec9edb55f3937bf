"""scikit-learn's 1,797 handwritten digits as a dataset of three tasks, with nothing to download.

    digit      which digit (classification)
    thickness  the stroke's width in pixels of the 8x8 picture: ink area / skeleton length (regression)
    ink        which pixels are ink (segmentation)

The pictures are 8x8 with 17 greys. Stroke and ink are measured on the picture enlarged 4 times by bicubic
interpolation, and that 32x32 picture is what is stored, so that picture, mask and measure belong together.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
from PIL import Image

from mtl_dist.errors import UserError
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.measures import INK, enlarged, stroke_width
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.segmentation import BACKGROUND, Segmentation

ENLARGED = 4

_DARKEST = 16


class Digits(Importer):
    """scikit-learn's 1,797 handwritten digits: three tasks, nothing to download.

    Which digit (one of ten classes), how thick the stroke is (a number, measured from the picture), which
    pixels are ink (a mask).

    \b
      mtl prepare digits data/digits
    """

    fractions: ClassVar[tuple[float, ...]] = (0.7, 0.15, 0.15)

    def __init__(self) -> None:
        try:
            import skimage.morphology  # noqa: F401 (used by `stroke_width`)
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "prepare digits: expected scikit-learn and scikit-image, found one missing. "
                'Install both with `pip install "mtl-dist[demo]"`.'
            ) from None
        self._digits = load_digits()

    @property
    def name(self) -> str:
        return "digits"

    def tasks(self) -> Mapping[str, TaskSource]:
        return {
            "digit": TaskSource(Classification.name, tuple("0123456789")),
            "thickness": TaskSource(Regression.name, unit="px"),
            "ink": TaskSource(Segmentation.name, (BACKGROUND, "ink")),
        }

    def records(self) -> Iterator[Record]:
        for number, (picture, digit) in enumerate(zip(self._digits.images, self._digits.target, strict=True)):
            image = enlarge(picture)
            ink = image >= INK
            labels = {"digit": int(digit), "thickness": round(stroke_width(ink) / ENLARGED, 4)}
            yield Record(f"digit_{number:04d}", _png(image), labels, {"ink": _png(ink.astype(np.uint8))})


def enlarge(picture: np.ndarray) -> np.ndarray:
    """An 8x8 picture of values 0..16 as uint8 (32, 32), 0 is paper."""
    large = enlarged((picture * (255 / _DARKEST)).astype(np.float32), ENLARGED)
    return np.clip(np.rint(large), 0, 255).astype(np.uint8)


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
