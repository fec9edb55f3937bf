"""The pictures of a page: samples of the run's own data, with labels and answers drawn on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mtl_dist.data.decode import decode_image, decode_map
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.loader import Data, open_data
from mtl_dist.data.mixing import Concatenation
from mtl_dist.data.overlays import compared, legend_colours, one_picture, overlaid
from mtl_dist.data.reader import UnreadableSample
from mtl_dist.errors import UserError
from mtl_dist.figures import svg
from mtl_dist.importers.external import with_indexes
from mtl_dist.kinds.kind import Colour
from mtl_dist.kinds.registry import kind_of, map_kind, scalar_kind
from mtl_dist.printable import printable
from mtl_dist.report.page.charts import unit_of, words
from mtl_dist.report.page.record import RunRecord, without_paths
from mtl_dist.tasks.task import Task

if TYPE_CHECKING:
    from mtl_dist.prediction.predictor import Predictor

SIDE = 184
_EACH, _EACH_WIDE, _MISTAKES, _MOST_NUMBERS = 4, 3, 8, 3
_TRUE: Colour = (46, 204, 113)
_PREDICTED: Colour = (255, 127, 14)


@dataclass(frozen=True)
class Picture:
    """One sample: its data URI, and lines below it."""

    uri: str
    lines: tuple[str, ...]
    wrong: bool = False


@dataclass(frozen=True)
class Gallery:
    """Pictures under a title; `legend` says what colours mean, by (CSS colour, words). `wide` ones show an
    image, its label and the answer beside one another."""

    title: str
    pictures: list[Picture]
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    wide: bool = False


class Samples:
    """The samples of a split by their positions; `problem` says why there are none."""

    def __init__(self, record: RunRecord, split: str) -> None:
        self._record = record
        self.problem = ""
        self._data: Data | None = None
        self._predictor: Predictor | None = None
        try:
            data = open_data(with_indexes(record.recipe.data), list(record.tasks))
            self._sources = data.sources[split]
            lengths = [source.reader.num_samples for source in self._sources]
            if sum(lengths) <= int(record.tables[split].columns["position"].max()):
                raise UserError("the dataset has fewer samples than it had")
            self._order = Concatenation(lengths)
            self._data = data
        except (UserError, KeyError, OSError) as error:
            why = without_paths(str(error)) if isinstance(error, UserError) else type(error).__name__
            self.problem = f"No pictures: the data of this run cannot be read here ({why.rstrip('.')})."

    def galleries(self, task: Task, columns: Mapping[str, np.ndarray]) -> list[Gallery]:
        """What a task has pictures of: maps, drawings best, median and worst; answers wrong and sure."""
        if self._data is None or not len(columns.get("position", ())):
            return []
        try:
            kind = kind_of(task.info.kind)
            if kind.is_map or kind.is_drawn:
                return self._best_to_worst(task, columns)
            if "correct" in columns:
                return self._mistakes(task, columns)
            if "error" in columns or "off" in columns:
                return self._outliers(task, columns)
        except (UnreadableSample, UnreadableImage, UserError, OSError) as error:
            self.problem = f"Pictures are missing: a sample could not be read ({type(error).__name__})."
        return []

    # ------------------------------------------------------------------ which
    def _mistakes(self, task: Task, columns: Mapping[str, np.ndarray]) -> list[Gallery]:
        wrong = np.flatnonzero(columns["correct"] == 0)
        if "confidence" in columns:
            sure = columns["confidence"].astype(np.float64)
        elif "label_probability" in columns:
            sure = 1 - columns["label_probability"].astype(np.float64)
        else:
            sure = columns["loss"].astype(np.float64)
        chosen = wrong[np.argsort(-sure[wrong], kind="stable")][:_MISTAKES]

        def lines(n: int) -> tuple[str, ...]:
            said = columns["class_name"][n] if "class_name" in columns else columns["labels"][n]
            of = f" ({columns['confidence'][n]:.0%})" if "confidence" in columns else ""
            return f"says {said or 'nothing'}{of}", f"label {columns['label'][n] or 'none'}"

        if not len(chosen):
            return []
        total = f"{len(wrong):,} of {len(columns['correct']):,} are wrong"
        return [
            Gallery(
                "Wrong and sure of it", self._plain(columns, chosen, lines), f"{total}; the surest first."
            )
        ]

    def _outliers(self, task: Task, columns: Mapping[str, np.ndarray]) -> list[Gallery]:
        off = columns["error" if "error" in columns else "off"].astype(np.float64)
        chosen = np.argsort(-np.abs(off), kind="stable")[:_MISTAKES]
        numbers = list(kind_of(task.info.kind).numbers(task.info).items())[:_MOST_NUMBERS]

        def said(what: str, key: str, n: int) -> str:
            shown = []
            for part, one in numbers:
                value = columns[f"{key}.{part}" if part else key][n]
                number = svg.short(float(value)) if np.isfinite(float(value)) else "-"
                shown.append(" ".join(filter(None, (part, number, one.unit))))
            return f"{what} {', '.join(shown)}"

        def lines(n: int) -> tuple[str, ...]:
            return said("says", "value" if "value" in columns else "values", n), said("label", "label", n)

        return [Gallery("Farthest off", self._plain(columns, chosen, lines), "The largest errors first.")]

    def _best_to_worst(self, task: Task, columns: Mapping[str, np.ndarray]) -> list[Gallery]:
        own = "dice" if "dice" in columns else task.settings.compared[0]
        values = columns[own].astype(np.float64)
        known = np.flatnonzero(np.isfinite(values))
        if not len(known):
            return []
        mode = task.settings.modes.get(own, "max")
        order = known[np.argsort(values[known] if mode == "min" else -values[known], kind="stable")]
        wide = kind_of(task.info.kind).is_map and not _in_outlines(task)
        each = _EACH_WIDE if wide else _EACH
        middle = max(0, len(order) // 2 - each // 2)
        galleries = []
        for title, some in (
            ("Best", order[:each]),
            ("Median", order[middle : middle + each]),
            ("Worst", order[::-1][:each]),
        ):
            show = self._overlay if kind_of(task.info.kind).is_map else self._drawing
            pictures = [show(task, columns, int(n), own) for n in some.tolist()]
            galleries.append(Gallery(title, pictures, legend=_legend(task), wide=wide))
        return galleries

    # ------------------------------------------------------------------ drawn
    def _plain(
        self, columns: Mapping[str, np.ndarray], chosen: np.ndarray, lines: Callable[[int], tuple[str, ...]]
    ) -> list[Picture]:
        pictures = []
        for n in chosen.tolist():
            key, image_CHW, _ = self._read(int(columns["position"][n]), ())
            picture = overlaid(image_CHW, {}, {}, {}, SIDE)
            pictures.append(Picture(_uri(picture), tuple(map(printable, (*lines(n), key)))))
        return pictures

    def _overlay(self, task: Task, columns: Mapping[str, np.ndarray], n: int, own: str) -> Picture:
        key, image_CHW, masks = self._read(int(columns["position"][n]), (task.name,))
        truth = map_kind(task.info.kind).values(decode_map(masks[task.name]), task.info)
        answer = self._model.predict(image_CHW)[task.name]
        said = task.map_of(answer)
        if said is None:
            said = truth
        if _in_outlines(task):
            picture = overlaid(one_picture(image_CHW), {}, {}, {}, SIDE)
            pixels = np.array(picture)
            for values, colour in ((truth, _TRUE), (said, _PREDICTED)):
                _outline(pixels, _in_size(values == 1, picture.size), colour)
            picture = Image.fromarray(pixels)
        else:
            colours = list(legend_colours({task.name: task.info}).values())
            picture = compared(image_CHW, truth, said, task.info, colours, SIDE)
        return Picture(_uri(picture), (_reached(task, columns, n, own), printable(key)))

    def _drawing(self, task: Task, columns: Mapping[str, np.ndarray], n: int, own: str) -> Picture:
        """Label and answer, drawn over one picture."""
        key, image_CHW, _, labels = self._sample(int(columns["position"][n]), ())
        answer = self._model.predict(image_CHW)[task.name]
        said = task.drawn(answer, (image_CHW.shape[1], image_CHW.shape[2]))
        picture = overlaid(one_picture(image_CHW), {}, {}, {}, SIDE)
        kind = scalar_kind(task.info.kind)
        kind.draw(picture, labels[task.name], task.info, [_TRUE], hollow=True)
        kind.draw(picture, said, task.info, [_PREDICTED])
        return Picture(_uri(picture), (_reached(task, columns, n, own), printable(key)))

    @property
    def _model(self) -> Predictor:
        if self._predictor is None:
            from mtl_dist.prediction.predictor import Predictor

            self._predictor = Predictor(self._record.folder.directory)
        return self._predictor

    def _read(self, position: int, masks: Sequence[str]) -> tuple[str, Any, dict[str, Any]]:
        return self._sample(position, masks)[:3]

    def _sample(
        self, position: int, masks: Sequence[str]
    ) -> tuple[str, Any, dict[str, Any], Mapping[str, Any]]:
        """Key, image, maps and labels."""
        place = self._order.samples(np.array([position]))
        source, row = int(place.sources[0]), int(place.rows[0])
        sample = self._sources[source].reader.read(row, tuple(masks))
        facts = self._record.facts
        image_CHW = decode_image(sample.image, facts.channels, facts.image_dtype)
        return sample.key, image_CHW, dict(sample.masks), sample.labels


def _reached(task: Task, columns: Mapping[str, np.ndarray], n: int, own: str) -> str:
    return f"{words(own)} {svg.short(float(columns[own][n]))}{unit_of(task, own)}"


def _in_outlines(task: Task) -> bool:
    """Whether a map is shown by the outline of its one class that is not background."""
    return len(task.info.classes) == 2


def _legend(task: Task) -> tuple[tuple[str, str], ...]:
    kind = kind_of(task.info.kind)
    if not kind.is_map or _in_outlines(task):
        return (_css(_TRUE), "label"), (_css(_PREDICTED), "predicted")
    colours = legend_colours({task.name: task.info})
    lines = ((_css(colour), words.removeprefix(f"{task.name}: ")) for (_, words), colour in colours.items())
    said = map_kind(task.info.kind).in_colours
    return (("", "image, label, predicted" + (f"; {said}" if said else "")), *lines)


def _css(colour: Colour) -> str:
    return f"rgb({colour[0]},{colour[1]},{colour[2]})"


def _in_size(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0


def _outline(pixels_HWC: np.ndarray, inside: np.ndarray, colour: Colour) -> None:
    """Draw the border of a region, two pixels wide."""
    inner = inside
    for _ in range(2):
        around = np.pad(inner, 1, mode="edge")
        inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    pixels_HWC[inside & ~inner] = colour


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
