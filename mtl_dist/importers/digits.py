"""scikit-learn's 1,797 handwritten digits as a dataset of three tasks, with nothing to download.

    digit      which digit (classification)
    thickness  the stroke's width in pixels of the 8x8 picture: ink area / skeleton length (regression)
    ink        which pixels are ink (segmentation)

The pictures are 8x8 with 17 greys. Stroke and ink are measured on the picture enlarged 4 times by bicubic
interpolation, and that 32x32 picture is what is stored, so that picture, mask and measure belong together.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mtl_dist.data.manifest import Manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.measures import INK, enlarged, stroke_width
from mtl_dist.importers.packing import STANDARD, PackOptions, Progress, pack, refuse_existing, silent
from mtl_dist.importers.splitting import split_by_fractions
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.segmentation import BACKGROUND, Segmentation

ENLARGED = 4

FRACTIONS = (0.7, 0.15, 0.15)
_DARKEST = 16


def prepare_digits(
    out: Path,
    options: PackOptions = STANDARD,
    progress: Progress = silent,
) -> Manifest:
    """Prepare the digits as the dataset `out`: train, val and test, 70, 15 and 15% of every digit.

    Raises:
        UserError: scikit-learn or scikit-image is missing; or what `pack` refuses.
    """
    refuse_existing(out)
    try:
        import skimage.morphology  # noqa: F401 (used by `stroke_width`)
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "prepare digits: expected scikit-learn and scikit-image, found one missing. "
            'Install both with `pip install "mtl-dist[demo]"`.'
        ) from None
    digits = load_digits()
    keys = [f"digit_{number:04d}" for number in range(len(digits.images))]
    labels = [int(label) for label in digits.target]
    records: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    splits = split_by_fractions(keys, labels, FRACTIONS, options.seed)
    for key, split, picture, label in zip(keys, splits, digits.images, labels, strict=True):
        image = enlarge(picture)
        ink = image >= INK
        values = {"digit": label, "thickness": round(stroke_width(ink) / ENLARGED, 4)}
        records[split].append(Record(key, _png(image), values, {"ink": _png(ink.astype(np.uint8))}))
    tasks = {
        "digit": TaskSource(Classification.name, tuple("0123456789")),
        "thickness": TaskSource(Regression.name, unit="px"),
        "ink": TaskSource(Segmentation.name, (BACKGROUND, "ink")),
    }
    return pack(records, out, tasks, "digits", options=options, progress=progress)


def enlarge(picture: np.ndarray) -> np.ndarray:
    """An 8x8 picture of values 0..16 as uint8 (32, 32), 0 is paper."""
    large = enlarged((picture * (255 / _DARKEST)).astype(np.float32), ENLARGED)
    return np.clip(np.rint(large), 0, 255).astype(np.uint8)


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
