"""Segmentation: a class for each pixel."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Colour, MapKind, StoredMap
from mtl_dist.kinds.masks import read_mask, store_mask
from mtl_dist.kinds.vocabulary import COLOUR, Declared, LabelError
from mtl_dist.specs import IGNORE, TaskInfo

if TYPE_CHECKING:
    from PIL import Image

BACKGROUND = "background"

_OPACITY = 0.25
_OUTLINE = 2
_FAINT: Colour = (134, 142, 150)


class Segmentation(MapKind):
    """A label is a mask: an 8-bit grey PNG of class indices, 255 where there is no label."""

    name = "segmentation"
    help = "A class for each pixel: a column of mask files, or a folder of masks named as their images."
    metavar: ClassVar[str] = "TASK=COLUMN|FOLDER|PATTERN"
    has_classes: ClassVar[bool] = True
    against_mixup: ClassVar[str] = "a pixel of a mask is of one class"
    dtype: ClassVar[str] = "uint8"
    measured_whole: ClassVar[bool] = True
    missing: ClassVar[float] = IGNORE

    def declare(self, task: str, declared: Declared) -> TaskInfo:
        """With background and the task's name where no classes are declared."""
        classes = (BACKGROUND, task) if declared.classes is None else declared.classes
        declared = replace(declared, classes=classes)
        plain = [value for value in declared.class_values if value < COLOUR]
        if plain and len(plain) < len(declared.class_values):
            raise LabelError("values or colours of masks", "both")
        if len(classes) > IGNORE or any(not 0 <= value <= IGNORE for value in plain):
            raise LabelError(
                f"at most {IGNORE} classes, with values from 0 to {IGNORE}", f"{len(classes)} classes"
            )
        return super().declare(task, declared)

    def store(
        self, data: bytes, opened: Image.Image | np.ndarray, info: TaskInfo, values: Mapping[int, int]
    ) -> StoredMap:
        return store_mask(data, opened, len(info.classes), values)

    def reread(
        self, data: bytes, opened: Image.Image | np.ndarray, info: TaskInfo, values: Mapping[int, int]
    ) -> bytes:
        """An array: a PNG takes ten times as long."""
        buffer = io.BytesIO()
        np.save(buffer, read_mask(opened, len(info.classes), values)[0])
        return buffer.getvalue()

    def tally(self, info: TaskInfo) -> np.ndarray:
        """The pixels of each class."""
        return np.zeros(len(info.classes), np.int64)

    def is_labelled(self, stored: StoredMap) -> bool:
        """Whether some pixel has a class: a mask that is 255 throughout is none."""
        return bool(stored.tally.any())

    def counts(self, tally: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        return tuple(tally.tolist())

    def check_files(self, task: str, examples: Mapping[str, str], tally: np.ndarray, info: TaskInfo) -> None:
        """Refuse masks of which some hold class indices and others greys, or only dark greys."""
        if "grey" in examples and "index" in examples:
            raise UserError(
                f"task {task!r}: expected one kind of masks, found class indices (0, 1) in "
                f"{examples['index']} and greys up to 255 in {examples['grey']}. "
                f"Name the classes by their values in the masks, for example 0:background,1:{task}."
            )
        if "grey" in examples and not tally[1]:
            raise UserError(
                f"task {task!r}: expected greys of 128 and above for {task} in some mask, found darker ones "
                f"alone, as in {examples['grey']}. "
                f"Name the classes by their values in the masks, for example 0:background,7:{task}."
            )

    def values(self, stored: np.ndarray, info: TaskInfo) -> np.ndarray:
        if stored.dtype != np.uint8 or stored.ndim != 2:
            raise LabelError("8-bit class indices", f"{stored.dtype} {stored.shape}")
        return stored

    def check(self, values: np.ndarray, info: TaskInfo) -> None:
        wrong = values[(values >= len(info.classes)) & (values != IGNORE)]
        if wrong.size:
            raise LabelError(f"classes from 0 to {len(info.classes) - 1} and {IGNORE}", str(wrong[0]))

    def legend(self, task: str, info: TaskInfo) -> list[str]:
        """Its classes but the background."""
        return [name if name == task else f"{task}: {name}" for name in info.classes if name != BACKGROUND]

    def palette(self, info: TaskInfo, colours: Sequence[Colour]) -> dict[int, Colour]:
        """A colour for each class but the background; what is ignored is grey."""
        shown = [index for index, name in enumerate(info.classes) if name != BACKGROUND]
        return dict(zip(shown, colours, strict=True)) | {IGNORE: _FAINT}

    def paint(
        self, pixels_HWC: np.ndarray, values: np.ndarray, info: TaskInfo, colours: Sequence[Colour]
    ) -> None:
        """Tint each class and draw its outline; what is ignored is grey."""
        for index, colour in self.palette(info, colours).items():
            inside = values == index
            if not inside.any():
                continue
            tint = np.array(colour, np.float32)
            pixels_HWC[inside] = (1 - _OPACITY) * pixels_HWC[inside] + _OPACITY * tint
            inner = inside
            for _ in range(_OUTLINE):
                around = np.pad(inner, 1, mode="edge")  # no outline along the picture's edge
                inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
            pixels_HWC[inside & ~inner] = colour
