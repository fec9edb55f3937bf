"""Boxes: four regression tasks of a sample that move with its image.

    data:
      boxes: {head: [head_xmin, head_ymin, head_xmax, head_ymax]}

The dataset holds left, top, right and bottom in pixels of the stored image. They go through every crop,
resize, flip and turn with the image and its masks, as `torchvision.transforms.v2` moves bounding boxes: what
is turned becomes the rectangle around it, what leaves the image is cut off. A box of which less than a pixel
is left counts as unlabelled in this view. Losses and metrics are in pixels of the image that the model sees,
predictions in pixels of the image as it came. Steps of the user's (`data.transforms`) do not move boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from mtl_dist.data.pictures import Box
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.lazy import torch
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

BoxTasks: TypeAlias = tuple[str, str, str, str]
"""The tasks of a box's left, top, right and bottom."""

_SMALLEST_SIDE = 1.0


def check_boxes(boxes: Mapping[str, BoxTasks], task_infos: Mapping[str, TaskInfo], mixup: bool) -> None:
    """Refuse boxes that are not of four regression tasks each.

    Raises:
        UserError: one line for each mistake.
    """
    problems = []
    used: dict[str, str] = {}
    for name, tasks in boxes.items():
        if name in task_infos:
            problems.append(
                f"data.boxes.{name}: expected a name of its own, found that of a task. Rename it."
            )
        for task in tasks:
            kind = task_infos[task].kind if task in task_infos else "no task of the recipe"
            if task not in task_infos or not kind_of(kind).is_number:
                problems.append(f"data.boxes.{name}: expected regression tasks, found {task} ({kind}).")
            elif task in used:
                problems.append(
                    f"data.boxes.{name}: expected each task once, found {task} in {used[task]} too."
                )
            used[task] = name
    if boxes and mixup:
        problems.append(
            "data.blend.mixup: expected no boxes, found some: two boxes have no mean. Use neither or one."
        )
    if problems:
        raise UserError("\n".join(problems))


def with_seen_edges(
    task_infos: Mapping[str, TaskInfo], boxes: Mapping[str, BoxTasks], size: tuple[int, int]
) -> dict[str, TaskInfo]:
    """The tasks' facts, with those of boxes as they are in images of `size`, whatever is stored.

    Mean and deviation, by which a target is standardised, are the middle and a quarter of the side.
    """
    seen = dict(task_infos)
    for tasks in boxes.values():
        for task, side in zip(tasks, size[::-1] * 2, strict=True):
            seen[task] = replace(
                task_infos[task], mean=side / 2, std=side / 4, minimum=0.0, maximum=float(side)
            )
    return seen


def box_of(edges: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Left, top, right and bottom in an image of `size` (height, width), as what torchvision moves."""
    from torchvision import tv_tensors  # (for which reading a recipe does not wait)

    box: Tensor = tv_tensors.BoundingBoxes(
        torch.tensor([list(edges)], dtype=torch.float32), format="XYXY", canvas_size=size
    )
    return box


def shown_box(box: Tensor, source: Box, size: tuple[int, int]) -> Tensor:
    """The box where the `source` part of its image is shown in `size`, cut off at the edges."""
    scale = torch.tensor([size[1] / source.width, size[0] / source.height]).repeat(2)
    corner = torch.tensor([source.left, source.top]).repeat(2)
    edges = (box.as_subclass(torch.Tensor) - corner) * scale
    return _cut(edges, size)


def edges_in(box: Tensor, size: tuple[int, int]) -> list[float] | None:
    """The edges of what is left of a box in an image of `size`; nothing where that is no box."""
    edges = _cut(box.as_subclass(torch.Tensor), size).as_subclass(torch.Tensor)[0].tolist()
    left, top, right, bottom = edges
    whole = right - left >= _SMALLEST_SIDE and bottom - top >= _SMALLEST_SIDE
    return edges if whole else None


def _cut(edges: Tensor, size: tuple[int, int]) -> Tensor:
    most = torch.tensor([size[1], size[0]], dtype=torch.float32).repeat(2)
    return box_of(torch.minimum(edges.clamp(min=0), most)[0].tolist(), size)
