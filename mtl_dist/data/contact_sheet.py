"""A page of samples with their labels and masks, decoded as a training run decodes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mtl_dist.config.errors import suggest
from mtl_dist.data.decode import decode_image, decode_map
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.inspect import spread
from mtl_dist.data.manifest import Manifest, read_manifest
from mtl_dist.data.map_style import split_reader
from mtl_dist.data.overlays import (
    CHANNELS_SHOWN,
    FAINT,
    INK,
    PAPER,
    LegendLine,
    fitted,
    legend_colours,
    overlaid,
    write,
)
from mtl_dist.data.reader import Sample, UnreadableSample
from mtl_dist.data.remote import Location
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Colour, ScalarKind
from mtl_dist.kinds.registry import kind_of, map_kind
from mtl_dist.specs import TaskInfo

_BOX = 208  # the square that a picture fills, in pixels
_GAP = 24
_MARGIN = 36
_LINE = 19
_TEXT, _TITLE = 14, 22
_BEHIND: Colour = (241, 243, 245)


def contact_sheet(directory: Location, split: str, out: Path, rows: int = 4, columns: int = 6) -> None:
    """Save a PNG of up to `rows` x `columns` samples, spread evenly over the split.

    Under each picture stand its key and its labels; masks lie over it, a colour per class except
    "background".

    Raises:
        UserError: no such dataset or split, a sample that cannot be decoded, or `out` cannot be written.
    """
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise UserError(
            f"{directory}: expected a split {split!r}, found none of this name. "
            f"{suggest(split, manifest.splits, 'It has')}"
        )
    reader = split_reader(directory, manifest, split)
    chosen = spread(reader.num_samples, rows * columns)
    colours = legend_colours(manifest.tasks)
    masked = tuple(name for name, info in manifest.tasks.items() if kind_of(info.kind).is_map)
    lines = [name for name in manifest.tasks if name not in masked]
    with_mask = {task: reader.labelled(task, np.array(chosen)) for task in masked}
    some_lack_one = any(not present.all() for present in with_mask.values())
    cell_height = _BOX + _LINE * (1 + len(lines) + some_lack_one) + 6 + _GAP
    columns = min(columns, len(chosen))
    width = max(_MARGIN * 2 + columns * (_BOX + _GAP) - _GAP, 3 * _BOX)
    top = _MARGIN + _TITLE + _LINE * (2 if colours else 1)
    height = top + -(-len(chosen) // columns) * cell_height + _MARGIN - _GAP

    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    _draw_head(draw, manifest, split, reader.num_samples, len(chosen), colours)
    for number, row in enumerate(chosen):
        x = _MARGIN + number % columns * (_BOX + _GAP)
        y = top + number // columns * cell_height
        try:
            sample = reader.read(row, tuple(task for task in masked if with_mask[task][number]))
            picture = _picture(sample, manifest, colours)
        except (UnreadableSample, UnreadableImage) as error:
            raise UserError(f"{reader.where(row)}: expected a readable sample, found {error}.") from None
        draw.rectangle((x, y, x + _BOX - 1, y + _BOX - 1), fill=_BEHIND)
        page.paste(picture, (x + (_BOX - picture.width) // 2, y + (_BOX - picture.height) // 2))
        _draw_labels(draw, (x, y + _BOX + 6), sample, manifest.tasks)
    try:
        page.save(out, "PNG")
    except OSError as error:
        raise UserError(f"{out}: expected a file that can be written, found: {error.strerror}.") from None


def _picture(sample: Sample, manifest: Manifest, colours: Mapping[LegendLine, Colour]) -> Image.Image:
    """The image, with its masks over it and its other maps beside it, as large as the box allows."""
    image_CHW = decode_image(sample.image, manifest.channels, manifest.image_dtype)
    maps = {}
    for task, data in sample.masks.items():
        info = manifest.tasks[task]
        maps[task] = map_kind(info.kind).values(decode_map(data), info)
    drawn = {
        task: label
        for task, label in sample.labels.items()
        if task in manifest.tasks and kind_of(manifest.tasks[task].kind).is_drawn
    }
    picture = overlaid(image_CHW, maps, manifest.tasks, colours, _BOX, drawn)
    picture.thumbnail((_BOX, _BOX), Image.Resampling.BOX)
    return picture


def _draw_head(
    draw: ImageDraw.ImageDraw,
    manifest: Manifest,
    split: str,
    num_samples: int,
    num_shown: int,
    colours: Mapping[LegendLine, Colour],
) -> None:
    title = f"{manifest.name}  {split}"
    end = _MARGIN + write(draw, (_MARGIN, _MARGIN - 8), title, INK, _TITLE) + 16
    about = f"{num_shown} of {num_samples:,} samples"
    if manifest.channels not in (1, 3):
        some = min(manifest.channels, CHANNELS_SHOWN)
        of = f" of {manifest.channels}" if some < manifest.channels else ""
        about += f", channels 0 to {some - 1}{of} side by side, row by row"
    write(draw, (end, _MARGIN), about, FAINT)
    x, y = float(_MARGIN), _MARGIN + _TITLE + 6
    for (_, words), colour in colours.items():
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=colour)
        x += 18 + write(draw, (x + 18, y), words, INK) + 24


def _draw_labels(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], sample: Sample, tasks: Mapping[str, TaskInfo]
) -> None:
    x, y = corner
    write(draw, (x, y), fitted(draw, sample.key, _BOX), FAINT, _TEXT - 2)
    missing_masks = []
    for name, info in tasks.items():
        kind = kind_of(info.kind)
        if not isinstance(kind, ScalarKind):
            missing_masks += [] if name in sample.masks else [name]
            continue
        y += _LINE
        label = sample.labels.get(name)
        value = "" if label is None else kind.text(label, info)
        start = x + write(draw, (x, y), f"{name}  ", FAINT)
        words = fitted(draw, value or "no label", x + _BOX - start)
        write(draw, (start, y), words, INK if value else FAINT)
    if missing_masks:
        write(draw, (x, y + _LINE), fitted(draw, f"no mask: {', '.join(missing_masks)}", _BOX), FAINT)
