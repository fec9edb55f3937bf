"""Predicted maps as files: masks that a viewer shows, and the image with the map and its legend."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mtl_dist.data.overlays import colours_of, legend_colours, overlaid, with_legend
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Colour, MapKind, ScalarKind
from mtl_dist.kinds.registry import kind_of, map_kind
from mtl_dist.tasks.task import Task

_SIDES = (512, 1280)
"""Pixels of an overlay's longer side: no fewer, no more, and else the image's own."""


def overlay_side(image_CHW: Tensor) -> int:
    """How long the longer side of an image's overlay is: outlines on a small image would hide it."""
    return min(max(*image_CHW.shape[1:], _SIDES[0]), _SIDES[1])


_LONGEST = 80
"""Letters of a name: those at its end, where names are longer."""


def in_colours(values: np.ndarray, palette: Mapping[int, Colour]) -> Image.Image:
    """A mask as an image of its values, shown in the colours of the palette."""
    indexed = Image.fromarray(values)
    colours = [palette.get(value, (0, 0, 0)) for value in range(256)]
    indexed.putpalette(np.array(colours, np.uint8).tobytes())
    return indexed


class Pictures:
    """Writes the maps of predictions into a folder, as `<image>_<task>.png` and `<image>_<task>_overlay.png`.

    `<image>` is the file's name without extension, or made of its whole path where another has that.
    """

    def __init__(self, directory: Path, tasks: Mapping[str, Task]) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: expected a folder to write, found: {error.strerror}.") from None
        self._directory = directory
        self._tasks = tasks
        self._task_infos = {name: task.info for name, task in tasks.items()}
        self._colours = legend_colours(self._task_infos)
        self._taken: set[str] = set()

    def example(self) -> dict[str, dict[str, str]]:
        """By task that is painted or drawn the keys of what `write` returns for it."""
        keys: dict[str, dict[str, str]] = {}
        for name, info in self._task_infos.items():
            kind = kind_of(info.kind)
            if isinstance(kind, MapKind):
                palette = kind.palette(info, colours_of(name, self._colours))
                keys[name] = {"mask" if palette else "values": "", "overlay": ""}
            elif isinstance(kind, ScalarKind) and kind.is_drawn:
                keys[name] = {"overlay": ""}
        return keys

    def write(self, name: str, image_CHW: Tensor, answers: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """By task of maps the paths of its `mask`, or of its `values` (.npy) where these are numbers, and of
        its `overlay`; by task that is drawn that of its `overlay` alone."""
        written: dict[str, dict[str, str]] = {}
        stem = ""
        for task, answer in answers.items():
            values = self._tasks[task].map_of(answer)
            label = self._tasks[task].drawn(answer, (image_CHW.shape[1], image_CHW.shape[2]))
            if values is None and label is None:
                continue
            stem = stem or self._stem(name)
            written[task] = {}
            info, colours = self._task_infos[task], colours_of(task, self._colours)
            palette = {} if values is None else map_kind(info.kind).palette(info, colours)
            if values is not None and palette:
                place = self._directory / f"{stem}_{task}.png"
                in_colours(values, palette).save(place)
                written[task]["mask"] = str(place)
            elif values is not None:
                place = self._directory / f"{stem}_{task}.npy"
                np.save(place, values)
                written[task]["values"] = str(place)
            side = overlay_side(image_CHW)
            maps = {} if values is None else {task: values}
            drawn = {} if label is None else {task: label}
            picture = overlaid(image_CHW, maps, self._task_infos, self._colours, side, drawn)
            lines = {words: colour for (of, words), colour in self._colours.items() if of == task}
            place = self._directory / f"{stem}_{task}_overlay.png"
            with_legend(picture, lines).save(place)
            written[task]["overlay"] = str(place)
        return written

    def _stem(self, name: str) -> str:
        file, at, page = name.rpartition("#")
        path, suffix = (file, f"-{page}") if at and page.isdecimal() else (name, "")
        whole = re.sub(r"[^\w.-]+", "_", path.removesuffix(Path(path).suffix)).strip("_")
        for number in itertools.count(1):
            for choice in (Path(path).stem, whole):
                stem = choice[-_LONGEST:] + suffix + (f"-{number}" if number > 1 else "")
                if stem.casefold() not in self._taken:
                    self._taken.add(stem.casefold())
                    return stem
        raise AssertionError("counting ends nowhere")
