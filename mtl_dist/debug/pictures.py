"""A batch as a picture: what the model sees, with its labels and maps, after resizing and augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mtl_dist.batch import Batch
from mtl_dist.data.overlays import (
    FAINT,
    INK,
    PAPER,
    LegendLine,
    fitted,
    legend_colours,
    overlaid,
    with_legend,
    write,
)
from mtl_dist.kinds.kind import Colour, ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.specs import TaskInfo

_BOX, _GAP, _MARGIN = 208, 16, 24  # pixels
_LINE, _TEXT, _TITLE = 19, 14, 18
_ACROSS = 4


@dataclass(frozen=True)
class Section:
    """A batch on the host, and what it shows."""

    title: str
    batch: Batch


def batch_picture(sections: Sequence[Section], tasks: Mapping[str, TaskInfo]) -> Image.Image:
    """One page: under each image its key and what each task has to say of it there."""
    colours = legend_colours(tasks)
    cell_height = _BOX + _LINE * (1 + max(_num_lines(section.batch, tasks) for section in sections)) + _GAP
    rows = [-(-len(section.batch) // _ACROSS) for section in sections]
    width = 2 * _MARGIN + _ACROSS * (_BOX + _GAP) - _GAP
    height = _MARGIN + sum(_TITLE + _GAP + count * cell_height for count in rows)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    top = _MARGIN
    for section, count in zip(sections, rows, strict=True):
        write(draw, (_MARGIN, top), fitted(draw, section.title, width - 2 * _MARGIN), INK, _TITLE - 2)
        top += _TITLE + _GAP
        for row in range(len(section.batch)):
            x = _MARGIN + row % _ACROSS * (_BOX + _GAP)
            y = top + row // _ACROSS * cell_height
            picture = _picture(section.batch, row, tasks, colours)
            page.paste(picture, (x + (_BOX - picture.width) // 2, y + (_BOX - picture.height) // 2))
            _draw_words(draw, (x, y + _BOX + 4), section.batch, row, tasks)
        top += count * cell_height
    return (
        with_legend(page, {words: colour for (_, words), colour in colours.items()}, _MARGIN)
        if colours
        else page
    )


def _num_lines(batch: Batch, tasks: Mapping[str, TaskInfo]) -> int:
    """How many tasks have something to say in words, of the sample with most of them."""
    return max(
        sum(bool(words_of(batch, row, task, info)) for task, info in tasks.items())
        for row in range(len(batch))
    )


def words_of(batch: Batch, row: int, task: str, info: TaskInfo) -> str:
    """What a sample's target says, in words; of a map whether it is there."""
    if not batch.labelled[task][row]:
        return "no label"
    kind = kind_of(info.kind)
    if not isinstance(kind, ScalarKind):
        return ""
    words = kind.text(kind.label_of(batch.targets[task][row].numpy(), info), info)
    if batch.lam_B is None or task not in batch.partners:
        return words
    lam = float(batch.lam_B[row])
    partner = kind.text(kind.label_of(batch.partners[task][row].numpy(), info), info)
    return words if lam == 1 else f"{lam:.2f} {words} + {1 - lam:.2f} {partner}"


def _picture(
    batch: Batch, row: int, tasks: Mapping[str, TaskInfo], colours: Mapping[LegendLine, Colour]
) -> Image.Image:
    maps: dict[str, np.ndarray] = {
        name: batch.targets[name][row].numpy()
        for name, info in tasks.items()
        if kind_of(info.kind).is_map and batch.labelled[name][row]
    }
    drawn = {
        name: kind.seen(batch.targets[name][row].numpy(), info)
        for name, info in tasks.items()
        if isinstance(kind := kind_of(info.kind), ScalarKind) and kind.is_drawn and batch.labelled[name][row]
    }
    picture = overlaid(batch.images_BCHW[row], maps, tasks, colours, _BOX, drawn)
    picture.thumbnail((_BOX, _BOX), Image.Resampling.BOX)
    return picture


def _draw_words(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], batch: Batch, row: int, tasks: Mapping[str, TaskInfo]
) -> None:
    x, y = corner
    write(draw, (x, y), fitted(draw, batch.keys[row], _BOX), FAINT, _TEXT - 2)
    for task, info in tasks.items():
        words = words_of(batch, row, task, info)
        if not words:
            continue
        y += _LINE
        start = x + write(draw, (x, y), f"{fitted(draw, task, _BOX / 2)}  ", FAINT)
        ink = INK if batch.labelled[task][row] else FAINT
        write(draw, (start, y), fitted(draw, words, x + _BOX - start), ink)
