"""Depth, and any other dense number: disparity, height, a heat map."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Colour, MapKind, StoredMap, UnreadableMap, check_fact_names
from mtl_dist.kinds.moments import NO_VALUES, deviation, moments_of, pooled
from mtl_dist.kinds.view import View
from mtl_dist.kinds.vocabulary import LabelError
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from PIL import Image

_STORED = ("uint8", "uint16", "float16", "float32")
_FACTS = ("scale", "invalid", "range", "metric")
_COUNTED = ("pixels", "positive", "log_mean", "log_std")
_NEAR, _FAR = np.array([253.0, 231.0, 37.0]), np.array([68.0, 1.0, 84.0])  # the ends of viridis
_MIDDLE = np.array([33.0, 145.0, 140.0])


@dataclass(frozen=True)
class Reading:
    """How the numbers in the files of a task are read: its facts.

    scale    a number times this is a value in the task's unit
    invalid  the number in a file that says "no value here"; None where every number is a value
    range    the smallest and the largest value that count, in the unit
    metric   whether a value is a distance from the camera: enlarging the image by 2 halves it
    """

    scale: float = 1.0
    invalid: float | None = 0.0
    range: tuple[float, float] = (-math.inf, math.inf)
    metric: bool = False

    @classmethod
    def of(cls, info: TaskInfo) -> Reading:
        """That of a task.

        Raises:
            UserError: a fact that says nothing of this kind.
        """
        check_fact_names(info, _FACTS, _COUNTED)
        stated = {key: info.facts[key] for key in _FACTS if key in info.facts}
        wanted = {"scale": "a number > 0", "invalid": "a number or null", "range": "[LOW, HIGH]"}
        scale, bounds = stated.get("scale", 1.0), stated.get("range", [0, 0])
        fits = {
            "scale": _is_number(scale) and 0 < scale < math.inf,
            "invalid": stated.get("invalid") is None or _is_number(stated["invalid"]),
            "range": isinstance(bounds, list | tuple) and len(bounds) == 2 and all(map(_is_number, bounds)),
            "metric": isinstance(stated.get("metric", False), bool),
        }
        for key in (key for key in stated if not fits[key]):
            raise UserError(
                f"facts of a {info.kind} task: expected {key} to be {wanted.get(key, 'true or false')}, "
                f"found {stated[key]!r}. Correct it."
            )
        if "range" in stated:
            low, high = stated["range"]
            stated["range"] = (float(low), float(high))
        return cls(**stated)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Depth(MapKind):
    """A label is a map of numbers in a unit, with NaN where there is no value.

    Files are grey images of 8 or 16 bits, TIFFs of floats, or arrays; `Reading` says what their numbers mean.
    A PNG is stored as it came, what is none as .npy.
    """

    name = "depth"
    help = "A number for each pixel (depth, disparity, height): a column of files, or a folder of them."
    metavar: ClassVar[str] = "TASK=COLUMN|FOLDER|PATTERN"
    has_values: ClassVar[bool] = True
    against_mixup: ClassVar[str] = "two surfaces in one pixel have no depth"
    moves: ClassVar[bool] = True
    shared_facts: ClassVar[tuple[str, ...]] = _FACTS
    dtype: ClassVar[str] = "float32"
    covers: ClassVar[bool] = True
    missing: ClassVar[float] = math.nan

    def store(
        self, data: bytes, opened: Image.Image | np.ndarray, info: TaskInfo, values: Mapping[int, int]
    ) -> StoredMap:
        if isinstance(opened, np.ndarray):
            array = (
                opened.squeeze() if opened.ndim == 3 and 1 in (opened.shape[0], opened.shape[2]) else opened
            )
            as_it_came = array is opened and array.dtype.name in _STORED
        else:
            opened.load()
            if opened.mode not in ("L", "I", "I;16", "I;16B", "F"):
                raise UnreadableMap(
                    f"an image of mode {opened.mode!r}, where one number per pixel is expected"
                )
            array = np.asarray(opened)
            as_it_came = opened.format == "PNG" and opened.mode in ("L", "I;16")
        if array.ndim != 2 or array.dtype.kind not in "uif":
            raise UnreadableMap(
                f"an array of {array.dtype.name} {array.shape}, where numbers (H, W) are expected"
            )
        if not as_it_came:
            buffer = io.BytesIO()
            np.save(buffer, array.astype(np.float32))
            data = buffer.getvalue()
        height, width = array.shape
        return StoredMap(data, width, height, self._count(self.values(array, info)))

    def tally(self, info: TaskInfo) -> np.ndarray:
        """The moments of the values, and those of the logarithms of the positive ones."""
        Reading.of(info)
        return np.array(NO_VALUES * 2)

    def add(self, tally: np.ndarray, more: np.ndarray) -> np.ndarray:
        return np.concatenate([pooled(tally[:5], more[:5]), pooled(tally[5:], more[5:])])

    def facts(self, tally: np.ndarray, info: TaskInfo) -> TaskInfo:
        """With mean, deviation and range of all pixels, and those of the logarithms."""
        plain, logs = tally[:5], tally[5:]
        if not plain[0]:
            return info
        counted = {
            "pixels": int(plain[0]),
            "positive": int(logs[0]),
            "log_mean": float(logs[1]),
            "log_std": deviation(logs),
        }
        return replace(
            info,
            mean=float(plain[1]),
            std=deviation(plain),
            minimum=float(plain[3]),
            maximum=float(plain[4]),
            facts={**info.facts, **counted},
        )

    def restated(self, info: TaskInfo, stated: Mapping[str, Any]) -> TaskInfo:
        """Another scale changes mean, deviation and range; which numbers are values was counted already."""
        facts = {**info.facts, **stated}
        before, after = Reading.of(info), Reading.of(replace(info, facts=facts))
        scaled = tuple(limit * after.scale / before.scale for limit in before.range)
        if info.facts.get("pixels") and (after.invalid != before.invalid or after.range != scaled):
            raise UserError(
                "expected invalid and range as they were when the values were counted, found others. Prepare "
                "the dataset with them: --facts TASK='range: [0.1, 10]'."
            )
        factor = after.scale / before.scale
        if "log_mean" in facts:
            facts["log_mean"] += math.log(factor)
        of_values = {key: factor * getattr(info, key) for key in ("mean", "std", "minimum", "maximum")}
        return replace(info, facts=facts, **of_values)

    def merge(self, task_infos: Sequence[TaskInfo]) -> TaskInfo:
        """Pooled over the pixels of all."""
        if len(task_infos) == 1:
            return task_infos[0]
        tally = np.array(NO_VALUES * 2)
        for info in task_infos:
            num, positive = info.facts["pixels"], info.facts["positive"]
            plain = [num, info.mean, num * info.std**2, info.minimum, info.maximum]
            logs = [
                positive,
                info.facts["log_mean"],
                positive * info.facts["log_std"] ** 2,
                math.inf,
                -math.inf,
            ]
            tally = self.add(tally, np.array(plain + logs))
        return self.facts(tally, task_infos[0])

    def values(self, stored: np.ndarray, info: TaskInfo) -> np.ndarray:
        if stored.ndim != 2:
            raise LabelError("one number per pixel", f"an array {stored.shape}")
        reading = Reading.of(info)
        values = stored.astype(np.float32)
        absent = ~np.isfinite(values)
        if reading.invalid is not None:
            absent |= stored == reading.invalid
        values *= np.float32(reading.scale)
        low, high = reading.range
        absent |= (values < low) | (values > high)
        values[absent] = np.nan
        return values

    def moved(self, values: np.ndarray, view: View, info: TaskInfo) -> np.ndarray:
        """A distance shrinks as its image is enlarged, where the task's facts say that it is one."""
        return values / np.float32(view.zoom) if Reading.of(info).metric else values

    in_colours: ClassVar[str] = "bright where values are small, one scale for both, black where there is none"

    def paint(
        self, pixels_HWC: np.ndarray, values: np.ndarray, info: TaskInfo, colours: Sequence[Colour]
    ) -> None:
        """From bright (the smallest value of the map) to dark; nothing where there is no value."""
        pixels_HWC[:] = shaded(values)

    def _count(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([moments_of(values), moments_of(np.log(values[values > 0]))])


def shaded(values: np.ndarray) -> np.ndarray:
    """A map of numbers as a picture (H, W, 3) of uint8: bright where they are small."""
    there = np.isfinite(values)
    low, high = (float(values[there].min()), float(values[there].max())) if there.any() else (0.0, 0.0)
    at = ((np.nan_to_num(values) - low) / max(high - low, 1e-12)).clip(0, 1)[..., None]
    colours = np.where(
        at < 0.5, _NEAR + (_MIDDLE - _NEAR) * (2 * at), _MIDDLE + (_FAR - _MIDDLE) * (2 * at - 1)
    )
    picture: np.ndarray = np.where(there[..., None], colours, 0).astype(np.uint8)
    return picture
