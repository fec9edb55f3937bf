"""Keypoints: places in the image by their names, each of which may be missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mtl_dist.config.nearest import nearest
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Colour, Label, ScalarKind, check_fact_names
from mtl_dist.kinds.view import View
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError, Vocabulary
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from PIL import Image

_CENTRE = 0.5  # of a pixel: labels count from the centre of the first one, views from its corner
_FACTS, _COUNTED = ("swap", "skeleton"), ("positions",)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_BETWEEN = re.compile(r"[\s,;\[\]()'\"]*")
_RIGHT = {"l": "r", "L": "R"}
_OUTSIDE = "points outside of their image, taken as missing"
_MOST_COLOURS = 7
_EDGE = (33, 37, 41)
MISSING, HIDDEN, VISIBLE = 0, 1, 2


class Keypoints(ScalarKind):
    """A label is K points (x, y, visibility), in the order of the points' names, and the size of its image.

    x and y are in pixels of the image as it is displayed, (0, 0) the centre of its first pixel; visibility is
    0 where a point is missing, 1 where it is hidden and 2 where it is seen, as COCO has it. In JSON it is
    `{"points": [[x, y, visibility], ...], "size": [width, height]}`; a size of 0 is not known.

    A target is float32 (K + 3, 3): (x, y, visibility) of each point, where -1 and 1 are the view's edges;
    two rows that take (x, y, 1) of the view to pixels of the image; and the image's width and height.
    """

    name = "keypoints"
    help = "Points by name: columns of x, y (and visibility), or NAME,... for NAME_x, NAME_y (and NAME_v)."
    metavar: ClassVar[str] = "TASK=COLUMN,..."
    has_classes: ClassVar[bool] = True
    class_words: ClassVar[tuple[str, str]] = ("point", "points")
    moves: ClassVar[bool] = True
    has_place: ClassVar[bool] = True
    is_drawn: ClassVar[bool] = True
    against_mixup: ClassVar[str] = "two faces in one picture have no eyes between theirs"
    against_cutmix: ClassVar[str] = "a rectangle of another image hides points and brings its own"
    shared_facts: ClassVar[tuple[str, ...]] = ("swap", "skeleton")

    # ---- from cells
    def cell_columns(self, text: str, columns: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """`NAME,...` of NAME_x, NAME_y and NAME_v where these are columns; else the columns themselves."""
        parts = [part.strip() for part in text.split(",")]
        if all(part not in columns and f"{part}_x" in columns and f"{part}_y" in columns for part in parts):
            with_flags = all(f"{part}_v" in columns for part in parts)
            endings = ("_x", "_y", "_v") if with_flags else ("_x", "_y")
            return tuple(part + ending for part in parts for ending in endings), tuple(parts)
        for endings in (("_x", "_y", "_v"), ("_x", "_y")):
            stems = [parts[at].removesuffix("_x") for at in range(0, len(parts), len(endings))]
            if parts == [stem + ending for stem in stems for ending in endings]:
                return tuple(parts), tuple(stems)
        return tuple(parts), ()

    def declare(self, task: str, declared: Declared) -> TaskInfo:
        info = super().declare(task, declared)
        self.check_facts(info)
        return info

    def terms(self, cell: Cell, declared: Declared) -> list[str]:
        """The numbers of the points, from 1 on, where they have no names."""
        if declared.classes is not None or not (values := _values(cell)):
            return []
        if len(values) % 6 == 0:
            raise LabelError(
                "points whose number is known",
                f"{len(values)} values, which are x and y of {len(values) // 2} points, or x, y and "
                f"visibility of {len(values) // 3}",
                "Name them: --classes TASK=NAME,...",
            )
        if len(values) % 2 and len(values) % 3:
            raise LabelError("x and y, or x, y and visibility, of each point", f"{len(values)} values")
        num_points = len(values) // (2 if len(values) % 2 == 0 else 3)
        return [str(number) for number in range(1, num_points + 1)]

    def parse(self, cell: Cell, words: Vocabulary) -> Label | None:
        values, names = _values(cell), words.names
        if not any(value is not None for value in values):
            return None
        if len(values) not in (2 * len(names), 3 * len(names)) or not names:
            raise LabelError(
                f"x and y, or x, y and visibility, of {len(names)} points ({', '.join(names)})",
                f"{len(values)} values",
            )
        each = len(values) // len(names)
        points = [
            _point(values[at : at + each], name)
            for at, name in zip(range(0, len(values), each), names, strict=True)
        ]
        return labelled(points)

    def beside(self, label: Label, given: View, info: TaskInfo, found: Counter[str]) -> Label | None:
        """Turned as its image is displayed, with the image's size; points outside of it are missing."""
        array = _array(label, info)
        there = array[:-1, 2] > 0
        turn = given.matrix[:, :2]
        places = array[:-1, :2] @ turn.T + (given.matrix[:, 2] + turn.sum(axis=1) * _CENTRE - _CENTRE)
        inside = given.shows(places + _CENTRE)
        found[_OUTSIDE] += int((there & ~inside).sum())
        points = [
            [x, y, int(visibility)] if seen else [0.0, 0.0, MISSING]
            for (x, y), visibility, seen in zip(
                places.tolist(), array[:-1, 2].tolist(), (there & inside).tolist(), strict=True
            )
        ]
        return labelled(points, (given.size[1], given.size[0]))

    # ---- stored
    def column_type(self, info: TaskInfo) -> tuple[str, tuple[int, ...]]:
        return "<f8", (len(info.classes) + 1, 3)

    def encode(self, labels: Sequence[Label | None], info: TaskInfo) -> np.ndarray:
        column = np.zeros((len(labels), len(info.classes) + 1, 3))
        for row, label in zip(column, labels, strict=True):
            if label is not None:
                row[:] = _array(label, info)
        return column

    def decode(self, value: Any, info: TaskInfo) -> Label:
        points = [[x, y, int(visibility)] for x, y, visibility in value[:-1].tolist()]
        return {"points": points, "size": value[-1, :2].astype(int).tolist()}

    def counts(self, column: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        """How often each point is there."""
        return tuple((column[:, :-1, 2] > 0).sum(axis=0).tolist())

    def facts(self, column: np.ndarray, info: TaskInfo) -> TaskInfo:
        """With the number and the mean (x, y) of each point in images of a known size, from -1 to 1."""
        sizes_N12 = column[:, -1:, :2]
        there_NK = (column[:, :-1, 2] > 0) & (sizes_N12 > 0).all(axis=2)
        scaled_NK2 = 2 * (column[:, :-1, :2] + _CENTRE) / np.maximum(sizes_N12, 1) - 1
        counts_K = there_NK.sum(axis=0)
        sums_K2 = np.where(there_NK[..., None], scaled_NK2, 0.0).sum(axis=0)
        means_K2 = sums_K2 / np.maximum(counts_K, 1)[:, None]
        positions = [[n, *mean] for n, mean in zip(counts_K.tolist(), means_K2.tolist(), strict=True)]
        return replace(info, facts={**info.facts, "positions": positions})

    def merge(self, task_infos: Sequence[TaskInfo]) -> TaskInfo:
        """The positions pooled over the points of all."""
        found = [info.facts["positions"] for info in task_infos if info.facts.get("positions")]
        if len(task_infos) == 1 or not found:
            return task_infos[0]
        all_SK3 = np.array(found, np.float64)
        counts_K = all_SK3[..., 0].sum(axis=0)
        sums_K2 = (all_SK3[..., :1] * all_SK3[..., 1:]).sum(axis=0)
        means_K2 = sums_K2 / np.maximum(counts_K, 1)[:, None]
        positions = [[int(n), *mean] for n, mean in zip(counts_K.tolist(), means_K2.tolist(), strict=True)]
        return replace(task_infos[0], facts={**task_infos[0].facts, "positions": positions})

    def check_facts(self, info: TaskInfo) -> None:
        check_fact_names(info, _FACTS, _COUNTED)
        for key in ("swap", "skeleton"):
            pairs = info.facts.get(key, [])
            if not isinstance(pairs, list | tuple) or not all(map(_is_pair, pairs)):
                raise UserError(
                    f"facts of a {info.kind} task: expected {key} to be pairs of points, as [[left_eye, "
                    f"right_eye]], found {pairs!r}. Correct it."
                )
            for name in (name for pair in pairs for name in pair):
                if info.classes and name not in info.classes:
                    near = nearest(name, info.classes)
                    hint = f"Did you mean {near}?" if near else "Correct it."
                    raise UserError(
                        f"facts of a {info.kind} task: expected {key} of the points "
                        f"{', '.join(info.classes)}, found {name!r}. {hint}"
                    )
        swapped = [name for pair in info.facts.get("swap", []) for name in pair]
        twice = [name for name, number in Counter(swapped).items() if number > 1]
        if twice:
            raise UserError(
                f"facts of a {info.kind} task: expected each point in one swap, found {twice[0]} twice. "
                "Remove one."
            )

    # ---- in a batch
    def targets(self, batch_size: int, info: TaskInfo) -> np.ndarray:
        return np.zeros((batch_size, len(info.classes) + 3, 3), np.float32)

    def target(self, label: object, info: TaskInfo) -> Any:
        """The label as in a cell of the column, float64 (K + 1, 3): `moved` makes the target of it."""
        return _array(label, info)

    def moved(self, target: Any, view: View, info: TaskInfo) -> Any | None:
        """The points where the view shows them; a flip of left and right exchanges the names that say so."""
        places = view.points(target[:-1, :2] + _CENTRE)
        there = (target[:-1, 2] > 0) & view.shows(places)
        if not there.any():
            return None
        moved = self.without_label(view, info)
        height, width = view.size
        scaled = 2 * places / np.array([width, height]) - 1
        points = np.where(there[:, None], np.column_stack([scaled, target[:-1, 2]]), 0.0)
        moved[:-3] = points[_exchanged(info)] if view.flipped else points
        return moved

    def without_label(self, view: View, info: TaskInfo) -> Any:
        """Without a point, but with the way from the view to the image."""
        target = np.zeros((len(info.classes) + 3, 3), np.float32)
        height, width = view.size
        back = np.linalg.inv(np.vstack([view.matrix, [0, 0, 1]]))
        to_pixels = np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
        to_image = back @ to_pixels
        to_image[:2, 2] -= _CENTRE
        target[-3:-1] = to_image[:2]
        target[-1, :2] = view.image[1], view.image[0]
        return target

    def label_of(self, target: Any, info: TaskInfo) -> Label:
        """In pixels of the image, whatever the view."""
        places = target[:-3, :2] @ target[-3:-1, :2].T + target[-3:-1, 2]
        points = [
            [x, y, int(visibility)] if visibility > 0 else [0.0, 0.0, MISSING]
            for (x, y), visibility in zip(places.tolist(), target[:-3, 2].tolist(), strict=True)
        ]
        return {"points": points, "size": target[-1, :2].astype(int).tolist()}

    def seen(self, target: Any, info: TaskInfo) -> Label:
        """In a view of 2 x 2: from -1 to 1 are its edges."""
        points = np.where(target[:-3, 2:] > 0, target[:-3], [0.0, 0.0, 0.0])
        places = (points[:, :2] + 1 - _CENTRE).tolist()
        return {
            "points": [[x, y, int(v)] for (x, y), v in zip(places, points[:, 2].tolist(), strict=True)],
            "size": [2, 2],
        }

    # ---- shown
    def text(self, label: Label, info: TaskInfo) -> str:
        return ", ".join(
            f"{name} {x:.4g} {y:.4g}{' (hidden)' if visibility == HIDDEN else ''}"
            for name, (x, y, visibility) in zip(info.classes, label["points"], strict=True)
            if visibility
        )

    def legend(self, task: str, info: TaskInfo) -> list[str]:
        """The points by name, or the task where these are too many for a colour each."""
        return list(info.classes) if len(info.classes) <= _MOST_COLOURS else [task]

    def draw(
        self,
        picture: Image.Image,
        label: Label,
        info: TaskInfo,
        colours: Sequence[Colour],
        hollow: bool = False,
    ) -> None:
        """Discs at the points, rings where they are hidden, joined as the skeleton says."""
        from PIL import ImageDraw

        draw = ImageDraw.Draw(picture)
        width, height = label["size"]
        scale = np.array([picture.width / width, picture.height / height])
        radius = max(2, round(max(picture.size) / 70)) + (2 if hollow else 0)
        places = {
            name: (((np.array([x, y]) + _CENTRE) * scale).tolist(), visibility, colours[at % len(colours)])
            for at, (name, (x, y, visibility)) in enumerate(zip(info.classes, label["points"], strict=True))
            if visibility
        }
        for one, other in info.facts.get("skeleton", []):
            if one in places and other in places:
                ends = [tuple(places[name][0]) for name in (one, other)]
                draw.line(ends, places[one][2], max(1, radius // 2))
        for (x, y), visibility, colour in places.values():
            box = (x - radius, y - radius, x + radius, y + radius)
            if hollow or visibility == HIDDEN:
                draw.ellipse(box, None, colour, 2)
            else:
                draw.ellipse(box, colour, _EDGE)


def labelled(points: Sequence[Sequence[float]], size: tuple[int, int] = (0, 0)) -> Label | None:
    """The label of some points (x, y, visibility) in an image of (width, height); None of no point at all."""
    if not any(visibility for _, _, visibility in points):
        return None
    return {"points": [list(point) for point in points], "size": list(size)}


def swapped_names(info: TaskInfo) -> list[tuple[str, str]]:
    """The pairs that a flip of left and right exchanges: those that are stated, else those whose names differ
    in `left` and `right` (or `l` and `r`) alone."""
    stated = info.facts.get("swap")
    if stated is not None:
        return [(one, other) for one, other in stated]
    pairs = []
    for name in info.classes:
        parts = re.split(r"([_\W]+)", name)
        by_letter = "".join(_RIGHT.get(part, part) for part in parts)
        for other in dict.fromkeys((name.replace("left", "right"), name.replace("Left", "Right"), by_letter)):
            if other != name and other in info.classes:
                pairs.append((name, other))
    return pairs


def _exchanged(info: TaskInfo) -> list[int]:
    """The number of the point that each is after a flip."""
    order = {name: name for name in info.classes}
    for one, other in swapped_names(info):
        order[one], order[other] = other, one
    return [info.classes.index(order[name]) for name in info.classes]


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(each, str) for each in value)
    )


def _values(cell: Cell) -> list[float | None]:
    """The numbers in a cell, None where one of several cells is empty."""
    if isinstance(cell, list) and all(not text or _NUMBER.fullmatch(text) for text in cell):
        return [float(text) if text else None for text in cell]
    text = " ".join(cell) if isinstance(cell, list) else cell
    rest = _NUMBER.sub("", text)
    if not _BETWEEN.fullmatch(rest):
        raise LabelError("numbers x, y (and visibility) of each point, or nothing", repr(text[:60]))
    return [float(match[0]) for match in _NUMBER.finditer(text)]


def _point(values: Sequence[float | None], name: str) -> list[float]:
    x, y = values[:2]
    visibility = values[2] if len(values) == 3 else None if x is None and y is None else VISIBLE
    if visibility in (None, MISSING) and (visibility == MISSING or (x is None and y is None)):
        return [0.0, 0.0, MISSING]
    if x is None or y is None:
        raise LabelError(f"x and y of {name}, or neither", "one of them")
    if visibility not in (HIDDEN, VISIBLE):
        found = "nothing" if visibility is None else f"{visibility:g}"
        raise LabelError(f"visibility 0, 1 or 2 of {name}", found)
    return [x, y, int(visibility)]


def _array(label: object, info: TaskInfo) -> np.ndarray:
    """A label as in a cell of the column, float64 (K + 1, 3).

    Raises:
        LabelError: it is none.
    """
    points = label.get("points") if isinstance(label, Mapping) else None
    size = label.get("size") if isinstance(label, Mapping) else None
    expected = f"{len(info.classes)} points (x, y, visibility) and a size"
    try:
        array = np.array([*(points or []), [*(size or []), 0]], np.float64)
    except (TypeError, ValueError):
        raise LabelError(expected, repr(label)[:80]) from None
    if array.shape != (len(info.classes) + 1, 3) or not np.isfinite(array).all():
        raise LabelError(expected, repr(label)[:80])
    if not np.isin(array[:-1, 2], (MISSING, HIDDEN, VISIBLE)).all():
        raise LabelError("visibility 0, 1 or 2", repr(label)[:80])
    return array


def mean_positions(info: TaskInfo) -> np.ndarray | None:
    """The mean (x, y) of each point in training, from -1 to 1, (K, 2): the centre of one that never occurs.
    None where the images' sizes are not known."""
    positions = info.facts.get("positions")
    if not positions or not any(number for number, _, _ in positions):
        return None
    return np.array([[x, y] for _, x, y in positions])
