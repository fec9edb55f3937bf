"""Masks as people keep them, turned into masks as shards keep them: 8-bit grey PNG of class indices.

How the values of a mask become classes, in this order:

1. A task with a table of values (`{1: "animal", 2: "background"}`) goes by that table alone.
2. A 1-bit mask and a palette mask mean their indices; but in a task of two classes a palette of greys
   means the greys (some tools write the white object as index 0).
3. In a task of two classes, values beyond 0 and 1 mean a grey picture: 128 and above is class 1. That
   covers 0/255 masks and soft edges. The values {0, 1, 255} are class indices with ignored pixels.
4. A task with colours for its values (`{0x804080: "road"}`) goes by the colours of the pixels.
5. Otherwise the values are class indices, and 255 is "ignore".
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from mtl_dist.kinds.kind import StoredMap, UnreadableMap
from mtl_dist.kinds.vocabulary import COLOUR, IGNORED, LabelError, colour_text
from mtl_dist.specs import IGNORE

if TYPE_CHECKING:
    from PIL import Image

THRESHOLD = 128
_OPAQUE = 255
_PNG_BIT_DEPTH = 24  # the byte of a PNG that holds it

Convention = Literal["either", "index", "grey"]
"""How the values were read; "either" where no other reading is possible (1-bit, nothing but 0)."""


def store_mask(
    data: bytes, opened: Image.Image | np.ndarray, num_classes: int, values: Mapping[int, int]
) -> StoredMap:
    """A mask normalised to class indices; `values` maps its values to classes, if not empty.

    The bytes are kept as they are where they already say the right thing in the right format. What is
    tallied are the pixels of each class.

    Raises:
        UnreadableMap, LabelError: as `read_mask`.
    """
    from PIL import Image

    classes, source, convention = read_mask(opened, num_classes, values)
    assert not isinstance(opened, np.ndarray), "it was read as an image"
    counts = np.bincount(classes.ravel(), minlength=IGNORE + 1)[:num_classes]
    as_stored = opened.format == "PNG" and opened.mode == "L" and data[_PNG_BIT_DEPTH] == 8
    if as_stored and np.array_equal(classes, source):
        png = data
    else:
        buffer = io.BytesIO()
        Image.fromarray(classes).save(buffer, "PNG")
        png = buffer.getvalue()
    height, width = classes.shape
    return StoredMap(png, width, height, counts.astype(np.int64), convention)


def read_mask(
    opened: Image.Image | np.ndarray, num_classes: int, values: Mapping[int, int]
) -> tuple[np.ndarray, np.ndarray, Convention]:
    """The class of each pixel, uint8 (H, W), of which values, and how they were read.

    Raises:
        UnreadableMap: the file is no image of one channel.
        LabelError: a value is no class of the task.
    """
    if isinstance(opened, np.ndarray):
        raise UnreadableMap("an array, where an image of class indices is expected")
    opened.load()
    if any(value >= COLOUR for value in values):
        classes, colours = _of_colours(opened, values)
        return classes, colours, "either"
    source, exact = _values(opened, num_classes, values)
    table, convention = _table(source, exact, num_classes, values)
    return table[source], source, convention


def _of_colours(image: Image.Image, values: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The class of each pixel by its colour, and the colours; what is not quite opaque is ignored.

    Raises:
        LabelError: a colour is no class of the task.
    """
    pixels = np.asarray(image.convert("RGBA")).astype(np.int64)
    colours = COLOUR + (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
    classes = np.full(colours.shape, IGNORE, np.uint8)
    seen = pixels[..., 3] == _OPAQUE
    for value, index in values.items():
        if index != IGNORE:
            classes[seen & (colours == value)] = index
    wrong = colours[seen & ~np.isin(colours, list(values))]
    if wrong.size:
        of_each = np.unique(wrong, return_counts=True)
        value = int(of_each[0][of_each[1].argmax()])
        listed = ", ".join(colour_text(each) for each in values)
        raise LabelError(
            f"the colours {listed}",
            f"{colour_text(value)} on {wrong.size:,} pixel(s)",
            f"Name it, or say that it is ignored: {colour_text(value)}:{IGNORED}. JPEG changes colours.",
        )
    return classes, colours


def _values(image: Image.Image, num_classes: int, values: Mapping[int, int]) -> tuple[np.ndarray, bool]:
    """The mask's values as uint8 (H, W), and whether they are class indices for sure."""
    array = np.asarray(image)
    if image.mode == "1":
        return array.astype(np.uint8), True
    if image.mode == "P":
        if num_classes == 2 and not values:
            palette = np.zeros((256, 3), np.uint8)
            colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette[: len(colours)] = colours
            used = palette[np.unique(array)]
            if (used == used[:, :1]).all():
                return palette[:, 0][array], False
        return array, True
    if image.mode in ("RGB", "RGBA", "LA"):
        colours = array if image.mode == "RGB" else array[..., :-1]
        if (colours != colours[..., :1]).any():
            raise UnreadableMap("a mask in colours, where class indices or greys are expected")
        return np.ascontiguousarray(colours[..., 0]), False
    if image.mode in ("L", "I", "I;16", "I;16B"):
        if array.max() > 255 or array.min() < 0:
            raise UnreadableMap("mask values beyond 0..255")
        return array.astype(np.uint8), False
    raise UnreadableMap(f"a mask of mode {image.mode!r}, which is not supported")


def _table(
    source: np.ndarray, exact: bool, num_classes: int, values: Mapping[int, int]
) -> tuple[np.ndarray, Convention]:
    """The class of each of the 256 values, and how they were read."""
    present = np.flatnonzero(np.bincount(source.ravel(), minlength=256))
    table = np.full(256, IGNORE, np.uint8)
    if values:
        for value, index in values.items():
            table[value] = index
        wrong = [int(v) for v in present if v != IGNORE and v not in values]
        if wrong:
            listed = ", ".join(str(v) for v in values)
            raise LabelError(f"the values {listed} (255 = ignore)", str(wrong[0]))
        return table, "either"
    beyond = set(present.tolist()) - {0, 1}
    if num_classes == 2 and not exact and beyond and not (beyond == {IGNORE} and 1 in present):
        table[:THRESHOLD], table[THRESHOLD:] = 0, 1
        return table, "grey"
    wrong = [int(v) for v in present if v >= num_classes and v != IGNORE]
    if wrong:
        raise LabelError(f"class indices from 0 to {num_classes - 1} (255 = ignore)", str(wrong[0]))
    table[:num_classes] = np.arange(num_classes)
    return table, "either" if exact or present.tolist() == [0] else "index"
