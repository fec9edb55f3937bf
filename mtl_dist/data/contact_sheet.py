"""A page of samples with their labels and masks, decoded as a training run decodes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtl_dist.data.decode import decode_image, decode_map
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.inspect import spread
from mtl_dist.data.manifest import Manifest, read_manifest
from mtl_dist.data.reader import Sample, SplitReader, UnreadableSample
from mtl_dist.data.remote import Location
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Colour, MapKind, ScalarKind
from mtl_dist.kinds.registry import kind_of, map_kind
from mtl_dist.specs import TaskInfo

_BOX = 208  # the square that a picture fills, in pixels
_GAP = 24
_MARGIN = 36
_LINE = 19
_TEXT, _TITLE = 14, 22
_INK: Colour = (33, 37, 41)
_FAINT: Colour = (134, 142, 150)
_PAPER: Colour = (255, 255, 255)
_BEHIND: Colour = (241, 243, 245)
# Okabe and Ito's colours, which colour-blind readers can distinguish; the one that skin and fur lack first.
_PALETTE: tuple[Colour, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
)


def contact_sheet(directory: Location, split: str, out: Path, rows: int = 4, columns: int = 6) -> None:
    """Save a PNG of up to `rows` x `columns` samples, spread evenly over the split.

    Under each picture stand its key and its labels; masks lie over it, a colour per class except
    "background".

    Raises:
        UserError: no such dataset or split, a sample that cannot be decoded, or `out` cannot be written.
    """
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise UserError(f"{directory}: expected a split {split!r}, found {', '.join(manifest.splits)}.")
    reader = SplitReader(directory, manifest, split)
    chosen = spread(reader.num_samples, rows * columns)
    colours = _colours(manifest.tasks)
    masked = tuple(name for name, info in manifest.tasks.items() if kind_of(info.kind).is_map)
    lines = [name for name in manifest.tasks if name not in masked]
    with_mask = {task: reader.labelled(task, np.array(chosen)) for task in masked}
    some_lack_one = any(not present.all() for present in with_mask.values())
    cell_height = _BOX + _LINE * (1 + len(lines) + some_lack_one) + 6 + _GAP
    columns = min(columns, len(chosen))
    width = max(_MARGIN * 2 + columns * (_BOX + _GAP) - _GAP, 3 * _BOX)
    top = _MARGIN + _TITLE + _LINE * (2 if colours else 1)
    height = top + -(-len(chosen) // columns) * cell_height + _MARGIN - _GAP

    page = Image.new("RGB", (width, height), _PAPER)
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


def _colours(tasks: Mapping[str, TaskInfo]) -> dict[tuple[str, str], Colour]:
    """A colour for each line of the legends of the tasks of maps, by task and words."""
    shown = [
        (name, words)
        for name, info in tasks.items()
        if isinstance(kind := kind_of(info.kind), MapKind)
        for words in kind.legend(name, info)
    ]
    return {key: _PALETTE[number % len(_PALETTE)] for number, key in enumerate(shown)}


def _picture(sample: Sample, manifest: Manifest, colours: Mapping[tuple[str, str], Colour]) -> Image.Image:
    """The image as large as the box allows, with its masks over it."""
    image_HWC = decode_image(sample.image, manifest.channels, manifest.image_dtype).permute(1, 2, 0).numpy()
    if image_HWC.shape[2] not in (1, 3):
        image_HWC = image_HWC[..., :1]  # of many channels the first
    if image_HWC.dtype != np.uint8:  # values of no fixed range: from dark to bright
        low, high = np.percentile(image_HWC, (1, 99))
        image_HWC = ((image_HWC - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    picture = Image.fromarray(np.broadcast_to(image_HWC, (*image_HWC.shape[:2], 3)).astype(np.uint8))
    scale = _BOX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = scale >= 2  # pixels are shown as they are
    pixels_HWC = np.array(
        picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    )
    for task, data in sample.masks.items():
        info = manifest.tasks[task]
        kind = map_kind(info.kind)
        values = _in_size(kind.values(decode_map(data), info), size)
        kind.paint(
            pixels_HWC, values, info, [colour for (name, _), colour in colours.items() if name == task]
        )
    return Image.fromarray(pixels_HWC)


def _in_size(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (..., H, W) in the (width, height) of its picture, every pixel one of its own."""
    width, height = size
    rows = (np.arange(height) + 0.5) * values.shape[-2] / height
    columns = (np.arange(width) + 0.5) * values.shape[-1] / width
    return values[..., rows.astype(int)[:, None], columns.astype(int)]


def _draw_head(
    draw: ImageDraw.ImageDraw,
    manifest: Manifest,
    split: str,
    num_samples: int,
    num_shown: int,
    colours: Mapping[tuple[str, str], Colour],
) -> None:
    title = f"{manifest.name}  {split}"
    draw.text((_MARGIN, _MARGIN - 8), title, _INK, _font(_TITLE))
    end = _MARGIN + draw.textlength(title, _font(_TITLE)) + 16
    draw.text((end, _MARGIN), f"{num_shown} of {num_samples:,} samples", _FAINT, _font(_TEXT))
    x, y = float(_MARGIN), _MARGIN + _TITLE + 6
    for (_, words), colour in colours.items():
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=colour)
        draw.text((x + 18, y), words, _INK, _font(_TEXT))
        x += 18 + draw.textlength(words, _font(_TEXT)) + 24


def _draw_labels(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], sample: Sample, tasks: Mapping[str, TaskInfo]
) -> None:
    x, y = corner
    draw.text((x, y), _fitted(draw, sample.key, _BOX), _FAINT, _font(_TEXT - 2))
    missing_masks = []
    for name, info in tasks.items():
        kind = kind_of(info.kind)
        if not isinstance(kind, ScalarKind):
            missing_masks += [] if name in sample.masks else [name]
            continue
        y += _LINE
        label = sample.labels.get(name)
        value = "" if label is None else kind.text(label, info)
        draw.text((x, y), name, _FAINT, _font(_TEXT))
        start = x + draw.textlength(f"{name}  ", _font(_TEXT))
        words = _fitted(draw, value or "no label", x + _BOX - start)
        draw.text((start, y), words, _INK if value else _FAINT, _font(_TEXT))
    if missing_masks:
        draw.text(
            (x, y + _LINE), _fitted(draw, f"no mask: {', '.join(missing_masks)}", _BOX), _FAINT, _font(_TEXT)
        )


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """The text, shortened until it is no wider than `width`."""
    if draw.textlength(text, _font(_TEXT)) <= width:
        return text
    while text and draw.textlength(f"{text}...", _font(_TEXT)) > width:
        text = text[:-1]
    return f"{text}..."


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's copy of DejaVu Sans: class names are not only ASCII, and Pillow's own font is.
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
