"""Surface normals: a direction for each pixel."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Colour, MapKind, StoredMap, UnreadableMap, check_fact_names
from mtl_dist.kinds.view import View
from mtl_dist.kinds.vocabulary import LabelError
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from PIL import Image

_STORED = ("int8", "int16", "uint8", "float16", "float32")
_SHORTEST = 0.5  # of a unit vector: what is shorter names no direction


class Normals(MapKind):
    """A label is a map of unit vectors (x, y, z), with NaN where there is none.

    x points to the right of the image and y down it; with the fact `y: up` up it. Files are colour images, in
    which 0 to 255 mean -1 to 1, or arrays (H, W, 3) or (3, H, W): floats, signed integers (whose length does
    not matter), or unsigned ones as in images. A vector of less than half a unit is none.
    """

    name = "normals"
    help = "A surface normal for each pixel: a column of files, or a folder of them."
    metavar: ClassVar[str] = "TASK=COLUMN|FOLDER|PATTERN"
    against_mixup: ClassVar[str] = "two surfaces in one pixel have no normal"
    moves: ClassVar[bool] = True
    shared_facts: ClassVar[tuple[str, ...]] = ("y",)
    dtype: ClassVar[str] = "float32"
    channels: ClassVar[int] = 3
    covers: ClassVar[bool] = True
    missing: ClassVar[float] = math.nan

    def store(
        self, data: bytes, opened: Image.Image | np.ndarray, info: TaskInfo, values: Mapping[int, int]
    ) -> StoredMap:
        if isinstance(opened, np.ndarray):
            array = opened
            as_it_came = array.dtype.name in _STORED
        else:
            opened.load()
            if opened.mode != "RGB":
                raise UnreadableMap(
                    f"an image of mode {opened.mode!r}, where three numbers per pixel are expected"
                )
            array = np.asarray(opened)
            as_it_came = opened.format == "PNG"
        try:
            normals = self.values(array, info)
        except LabelError as error:
            raise UnreadableMap(f"{error.found}, where {error.expected} are expected") from None
        if not as_it_came:
            buffer = io.BytesIO()
            np.save(buffer, array if array.dtype == np.uint8 else normals)
            data = buffer.getvalue()
        there = np.isfinite(normals[0])
        tally = np.array([there.sum(), *normals[:, there].astype(np.float64).sum(axis=1)])
        return StoredMap(data, normals.shape[2], normals.shape[1], tally)

    def tally(self, info: TaskInfo) -> np.ndarray:
        """The number of vectors, and their sum."""
        _y_points_down(info)
        return np.zeros(4)

    def facts(self, tally: np.ndarray, info: TaskInfo) -> TaskInfo:
        """With the number of vectors, and their mean."""
        if not tally[0]:
            return info
        mean = (tally[1:] / tally[0]).tolist()
        return replace(info, facts={**info.facts, "pixels": int(tally[0]), "mean": mean})

    def merge(self, task_infos: Sequence[TaskInfo]) -> TaskInfo:
        """Pooled over the vectors of all."""
        if len(task_infos) == 1:
            return task_infos[0]
        tallies = [
            np.array([1.0, *info.facts["mean"]]) * info.facts["pixels"]
            for info in task_infos
            if "mean" in info.facts
        ]
        return self.facts(np.sum(tallies, axis=0), task_infos[0]) if tallies else task_infos[0]

    def values(self, stored: np.ndarray, info: TaskInfo) -> np.ndarray:
        if stored.ndim != 3 or 3 not in (stored.shape[0], stored.shape[2]) or stored.dtype.kind not in "uif":
            raise LabelError("vectors (H, W, 3) or (3, H, W)", f"{stored.dtype.name} {stored.shape}")
        vectors = stored if stored.shape[0] == 3 and stored.shape[2] != 3 else np.moveaxis(stored, 2, 0)
        normals = vectors.astype(np.float32, order="C")
        if stored.dtype.kind == "u":
            normals = normals * np.float32(2 / np.iinfo(stored.dtype).max) - 1
        elif stored.dtype.kind == "i":
            normals /= np.iinfo(stored.dtype).max
        with np.errstate(invalid="ignore", over="ignore"):
            lengths = np.sqrt(np.square(normals).sum(axis=0))
            normals /= np.where(np.isfinite(lengths) & (lengths >= _SHORTEST), lengths, np.nan)
        return normals

    def moved(self, values: np.ndarray, view: View, info: TaskInfo) -> np.ndarray:
        """Turned with the image: a flip negates x."""
        turn = view.rotation.astype(np.float32)
        if np.array_equal(turn, np.eye(2)):
            return values
        if not _y_points_down(info):
            turn = turn * np.array([[1, -1], [-1, 1]], np.float32)
        moved = values.copy()
        moved[:2] = np.tensordot(turn, values[:2], axes=1)
        return moved

    in_colours: ClassVar[str] = "red is x, green y, blue z; grey where there is none"

    def paint(
        self, pixels_HWC: np.ndarray, values: np.ndarray, info: TaskInfo, colours: Sequence[Colour]
    ) -> None:
        """In the usual colours: red for x, green for y, blue for z."""
        pixels_HWC[:] = coloured(values)


def coloured(normals_3HW: np.ndarray) -> np.ndarray:
    """Vectors as a picture (H, W, 3) of uint8, from -1 (0) to 1 (255); grey where there is none."""
    picture = np.rint((np.nan_to_num(normals_3HW) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(picture, 0, 2))


def _y_points_down(info: TaskInfo) -> bool:
    check_fact_names(info, ["y"], ["pixels", "mean"])
    direction = info.facts.get("y", "down")
    if direction not in ("down", "up"):
        raise UserError(
            f"facts of a {info.kind} task: expected y to be down or up, found {direction!r}. Correct it."
        )
    return bool(direction == "down")
