"""An answer as JSON holds it, with its maps as pictures where these are asked for."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from mtl_dist.data.overlays import colours_of, legend_colours, overlaid
from mtl_dist.kinds.registry import map_kind
from mtl_dist.prediction.pictures import in_colours, overlay_side
from mtl_dist.prediction.predictor import Answers
from mtl_dist.prediction.records import plain
from mtl_dist.tasks.task import Task


def as_json(answers: Answers) -> dict[str, dict[str, Any]]:
    """All but the maps."""
    return {task: plain(answer) for task, answer in answers.items()}


def maps_of(answers: Answers, image_CHW: Tensor, tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """By task of maps its `mask` in the image's size (a PNG of class indices, where it has classes), its
    `overlay` and `legend`; by task that is drawn the last two."""
    task_infos = {name: task.info for name, task in tasks.items()}
    colours = legend_colours(task_infos)
    side = overlay_side(image_CHW)
    shown: dict[str, dict[str, Any]] = {}
    for name, answer in answers.items():
        values = tasks[name].map_of(answer)
        label = tasks[name].drawn(answer, (image_CHW.shape[1], image_CHW.shape[2]))
        if values is None and label is None:
            continue
        maps = {} if values is None else {name: values}
        drawn = {} if label is None else {name: label}
        shown[name] = {
            "overlay": _png(overlaid(image_CHW, maps, task_infos, colours, side, drawn)),
            "legend": {
                words: "#{:02x}{:02x}{:02x}".format(*colour)
                for (task, words), colour in colours.items()
                if task == name
            },
        }
        palette = (
            {}
            if values is None
            else map_kind(task_infos[name].kind).palette(task_infos[name], colours_of(name, colours))
        )
        if values is not None and palette:
            shown[name]["mask"] = _png(in_colours(values, palette))
    return shown


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
