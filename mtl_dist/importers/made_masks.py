"""Masks made from the pictures themselves, where nobody drew any.

    otsu                 the object by brightness: Otsu's threshold, and of its two sides the one with the
                         smaller share of the picture's border
    my_project.masks.f   a function of the user's: picture (H, W, 3) uint8 -> mask (H, W) of booleans

Such a mask says nothing that the picture does not: it is for trying out, and a task beside others.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mtl_dist.config.user_defined import PartError, imported
from mtl_dist.errors import UserError
from mtl_dist.importers.sources import Source

OTSU = "otsu"
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601

MaskMaker = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class MadeMask:
    """The mask of a picture, made when it is packed; `how` is `otsu` or an import path."""

    image: Source
    how: str
    size: int = 0

    def read(self) -> bytes:
        """The mask as a PNG of 0 and 1.

        Raises:
            UnreadableImage: the picture is damaged.
            UserError: the user's function gives something else than a mask of the picture's size.
        """
        from mtl_dist.data.decode import decode_image  # torch takes a second to import

        picture = decode_image(self.image.read(), 3, "uint8").permute(1, 2, 0).numpy()
        mask = mask_maker(self.how)(picture)
        if np.shape(mask) != picture.shape[:2] or np.asarray(mask).dtype != bool:
            found = f"{np.asarray(mask).dtype} {np.shape(mask)}"
            raise UserError(
                f"{self.image}: expected a mask of bool {picture.shape[:2]} from {self.how}, found {found}."
            )
        buffer = io.BytesIO()
        Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def __str__(self) -> str:
        return f"the mask of {self.image} by {self.how}"


def mask_maker(how: str) -> MaskMaker:
    """The function that makes masks.

    Raises:
        UserError: neither `otsu` nor the import path of a function.
    """
    if how == OTSU:
        return object_by_brightness
    try:
        found = imported(how)
    except PartError as error:
        raise UserError(f"--mask: expected {OTSU} or the import path of a function: {error}") from None
    if not callable(found):
        raise UserError(f"--mask: expected a function at {how}, found {type(found).__name__}.")
    return found


def object_by_brightness(picture: np.ndarray) -> np.ndarray:
    """What Otsu's threshold sets off from the border of a picture (H, W, 3): booleans (H, W).

    Otsu, A threshold selection method from gray-level histograms, 1979: the threshold with the largest
    variance between the two sides. A picture of one grey has no object.
    """
    grey = np.rint(picture @ np.array(_GREY)).astype(np.uint8)
    counts = np.bincount(grey.ravel(), minlength=256).astype(float)
    below, levels = np.cumsum(counts), np.arange(256)
    sums = np.cumsum(counts * levels)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    if not np.isfinite(between).any():
        return np.zeros(grey.shape, bool)
    bright = grey > np.nanargmax(between)
    border = np.concatenate([bright[0], bright[-1], bright[1:-1, 0], bright[1:-1, -1]])
    return bright if border.mean() <= 0.5 else ~bright
