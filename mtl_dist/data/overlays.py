"""Pictures to look at: an image in the size that is wanted, maps laid over it, a legend of their colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtl_dist.fonts import font_for
from mtl_dist.kinds.kind import Colour, Label
from mtl_dist.kinds.registry import kind_of, map_kind, scalar_kind
from mtl_dist.specs import TaskInfo

LegendLine: TypeAlias = tuple[str, str]
"""A task and the words of a line of its legend."""

CHANNELS_SHOWN = 16

INK: Colour = (33, 37, 41)
FAINT: Colour = (134, 142, 150)
PAPER: Colour = (255, 255, 255)
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
_TEXT = 14
_SWATCH = 12
_LINE = 20
_MARGIN = 6
_GAP = 4


def legend_colours(tasks: Mapping[str, TaskInfo]) -> dict[LegendLine, Colour]:
    """A colour for each line of the legends of the tasks that are painted or drawn."""
    shown = [(name, words) for name, info in tasks.items() for words in kind_of(info.kind).legend(name, info)]
    return {key: _PALETTE[number % len(_PALETTE)] for number, key in enumerate(shown)}


def colours_of(task: str, colours: Mapping[LegendLine, Colour]) -> list[Colour]:
    """The colours of one task, in the order of its legend."""
    return [colour for (name, _), colour in colours.items() if name == task]


def overlaid(
    image_CHW: Tensor,
    maps: Mapping[str, np.ndarray],
    tasks: Mapping[str, TaskInfo],
    colours: Mapping[LegendLine, Colour],
    side: int,
    drawn: Mapping[str, Label] | None = None,
) -> Image.Image:
    """The image with its longer side of `side` pixels, and the `maps` of tasks laid over it; those that
    would cover it stand beside it, in as many rows as columns. Over all lie the labels that are `drawn`.

    Of an image that is neither grey nor in colour each channel, up to `CHANNELS_SHOWN`, is a picture of its
    own beside the first, which the maps lie over. Values of no fixed range go from dark to bright.
    """
    image_HWC = image_CHW.permute(1, 2, 0).numpy()
    height, width, channels = image_HWC.shape
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    apart = channels not in (1, 3)
    shown = (
        [image_HWC[..., c : c + 1] for c in range(min(channels, CHANNELS_SHOWN))] if apart else [image_HWC]
    )
    panels = [_in_colour(part, size, scale) for part in shown]
    pixels_HWC = panels[0]
    for task, values in maps.items():
        info = tasks[task]
        kind = map_kind(info.kind)
        if kind.covers:
            panels.append(np.empty_like(pixels_HWC))
        panel = panels[-1] if kind.covers else pixels_HWC
        kind.paint(panel, _in_size(values, size), info, colours_of(task, colours))
    if drawn:
        picture = Image.fromarray(pixels_HWC)
        for task, label in drawn.items():
            own = colours_of(task, colours)
            scalar_kind(tasks[task].kind).draw(picture, label, tasks[task], own)
        panels[0] = np.array(picture)
    return _side_by_side(panels)


def compared(
    image_CHW: Tensor,
    label: np.ndarray,
    answer: np.ndarray,
    info: TaskInfo,
    colours: Sequence[Colour],
    side: int,
) -> Image.Image:
    """The image (of many channels the first), its map and an answer's beside it, a gap between each two.

    Both maps are painted at once: where a kind's colours follow the values, one colour means one value.
    """
    image = np.array(overlaid(one_picture(image_CHW), {}, {}, {}, side))
    size = image.shape[1], image.shape[0]
    maps = np.concatenate([image, image], axis=1)
    both = np.concatenate([_in_size(label, size), _in_size(answer, size)], axis=-1)
    map_kind(info.kind).paint(maps, both, info, colours)
    gap = np.full((size[1], _GAP, 3), PAPER, np.uint8)
    return Image.fromarray(np.concatenate([image, gap, maps[:, : size[0]], gap, maps[:, size[0] :]], axis=1))


def one_picture(image_CHW: Tensor) -> Tensor:
    """The channels that make one picture: all of a grey or coloured image, else the first."""
    return image_CHW if len(image_CHW) in (1, 3) else image_CHW[:1]


def _in_colour(image_HWC: np.ndarray, size: tuple[int, int], scale: float) -> np.ndarray:
    """A picture of one or three channels in (width, height), uint8 (H, W, 3)."""
    if image_HWC.dtype != np.uint8:
        low, high = np.percentile(image_HWC, (1, 99))
        image_HWC = ((image_HWC - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    picture = Image.fromarray(np.broadcast_to(image_HWC, (*image_HWC.shape[:2], 3)).astype(np.uint8))
    small = scale >= 2  # pixels are shown as they are
    return np.array(picture.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS))


def _side_by_side(panels: list[np.ndarray]) -> Image.Image:
    """Pictures of one size in as many rows as columns, or one fewer."""
    height, width = panels[0].shape[:2]
    across = math.ceil(math.sqrt(len(panels)))
    page = Image.new("RGB", (across * width, -(-len(panels) // across) * height), PAPER)
    for number, panel in enumerate(panels):
        page.paste(Image.fromarray(panel), (number % across * width, number // across * height))
    return page


def with_legend(picture: Image.Image, lines: Mapping[str, Colour], margin: int = _MARGIN) -> Image.Image:
    """The picture with a legend below: each line's words beside its colour, in as many rows as they need.

    `margin` is left free at both sides, in pixels.
    """
    draw = ImageDraw.Draw(picture)
    places = []
    x, y = margin, picture.height + _MARGIN
    for words, colour in lines.items():
        shown = fitted(draw, words, picture.width - 2 * margin - _SWATCH - 6)
        width = _SWATCH + 6 + round(draw.textlength(shown, font(_TEXT, shown)))
        if x > margin and x + width > picture.width - margin:
            x, y = margin, y + _LINE
        places.append((x, y, shown, colour))
        x += width + 16
    page = Image.new("RGB", (picture.width, y + _LINE), PAPER)
    page.paste(picture)
    draw = ImageDraw.Draw(page)
    for x, y, shown, colour in places:
        draw.rectangle((x, y + 2, x + _SWATCH, y + 2 + _SWATCH), fill=colour)
        write(draw, (x + _SWATCH + 6, y), shown, INK)
    return page


def fitted(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """The text, shortened until it is no wider than `width`."""
    face = font(_TEXT, text)
    if draw.textlength(text, face) <= width:
        return text
    while text and draw.textlength(f"{text}...", face) > width:
        text = text[:-1]
    return f"{text}..."


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, ink: Colour, size: int = _TEXT
) -> float:
    """Draw a line of text; its width."""
    face = font(size, text)
    draw.text(at, text, ink, face)
    return draw.textlength(text, face)


def font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """A font that has the characters of the text: class names are of any script."""
    return ImageFont.truetype(str(font_for(text)), size)


def _in_size(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (..., H, W) in the (width, height) of its picture, every pixel one of its own."""
    width, height = size
    rows = (np.arange(height) + 0.5) * values.shape[-2] / height
    columns = (np.arange(width) + 0.5) * values.shape[-1] / width
    return values[..., rows.astype(int)[:, None], columns.astype(int)]
