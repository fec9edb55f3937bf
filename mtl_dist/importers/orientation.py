"""Masks of images that EXIF turns: were they drawn on the picture as it is displayed, or as it is stored?

Images are read upright, so a mask drawn on the stored pixels has to be turned alike. Which it is nobody can
see where both readings have one size: then the user says it, with `--masks-as`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from mtl_dist.data.images import ImageFacts, upright
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import StoredMap
from mtl_dist.kinds.view import View

DISPLAYED, STORED, EITHER = "displayed", "stored", "either"


def turned(opened: Image.Image | np.ndarray, orientation: int) -> Image.Image | np.ndarray:
    """A map (..., H, W) on stored pixels, turned as its image is displayed."""
    if isinstance(opened, np.ndarray):
        last_first = np.moveaxis(opened, (-2, -1), (0, 1))
        return np.ascontiguousarray(np.moveaxis(upright(last_first, orientation), (0, 1), (-2, -1)))
    return opened.transpose(_METHODS[orientation])


_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_TURNS = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, -1, 1, 0),
    7: (0, -1, -1, 0),
    8: (0, 1, -1, 0),
}


def as_given(facts: ImageFacts, masks_as: str) -> View:
    """From the pixels that places in an image are given in, displayed or stored, to those displayed."""
    turn = np.array(_TURNS[facts.orientation if masks_as == STORED else 1], float).reshape(2, 2)
    size = np.array([facts.width, facts.height])
    matrix = np.column_stack([turn, np.where(turn.sum(axis=1) < 0, size, 0)])
    displayed = (facts.height, facts.width)
    return View(matrix, displayed, image=displayed)


def check_size(where: str, mask: StoredMap, facts: ImageFacts, masks_as: str) -> str:
    """Which readings the size of a turned image's mask allows; nothing where the image is not turned.

    Raises:
        UserError: the mask has another size than its image, with the way out where it is that of the stored
            pixels.
    """
    found, displayed = (mask.width, mask.height), (facts.width, facts.height)
    side_by_side = facts.orientation >= 5
    stored = displayed[::-1] if side_by_side else displayed
    if found != displayed:
        what = f"{where}: expected the size of its image, {facts.width}x{facts.height}"
        if facts.orientation > 1 and found == stored and not masks_as:
            raise UserError(
                f"{what} as EXIF orientation {facts.orientation} displays it, found "
                f"{mask.width}x{mask.height}, that of the stored pixels. Say --masks-as "
                "stored, which turns the masks too."
            )
        if side_by_side and found == stored and masks_as:
            other = STORED if masks_as == DISPLAYED else DISPLAYED
            raise UserError(
                f"{what} with --masks-as {masks_as} (EXIF orientation {facts.orientation}), found "
                f"{mask.width}x{mask.height}. It fits --masks-as {other} alone."
            )
        raise UserError(f"{what}, found {mask.width}x{mask.height}.")
    if facts.orientation == 1:
        return ""
    return EITHER if masks_as or stored == displayed else DISPLAYED


def check_readings(task: str, fits: Iterable[Mapping[str, tuple[str, int]]], masks_as: str) -> str:
    """What is to be said of the masks of turned images; nothing where there are none.

    Raises:
        UserError: no size tells whether they are those of the displayed or the stored pixels.
    """
    numbers = {DISPLAYED: 0, EITHER: 0}
    examples: dict[str, str] = {}
    for counts in fits:
        for fit, (example, number) in counts.items():
            numbers[fit] += number
            examples.setdefault(fit, example)
    total = sum(numbers.values())
    if not total:
        return ""
    if masks_as:
        return f"{task}: labels of images turned by EXIF, taken as drawn on the {masks_as} pixels: {total}"
    if numbers[DISPLAYED]:
        return (
            f"{task}: masks of images turned by EXIF, taken as drawn on the displayed pixels: {total} "
            f"({numbers[DISPLAYED]} fit no other reading)"
        )
    raise UserError(
        f"task {task!r}: expected to know whether masks were drawn on the displayed or the stored pixels, "
        f"found {total} images turned by EXIF where both have one size, as for {examples[EITHER]}. Say "
        "--masks-as displayed or --masks-as stored."
    )
