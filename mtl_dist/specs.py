"""What the packages of layer 1 tell one another: a task's facts and a head's shape.

Data learns a `TaskInfo` from the dataset, a task turns it into a `HeadSpec`, and a model builds the
head. None of the three imports another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TaskKind = Literal["classification", "multilabel", "regression", "segmentation"]

IGNORE = 255
"""The mask value that says "no label for this pixel"."""


@dataclass(frozen=True)
class TaskInfo:
    """What a dataset knows of one task, from the labels of its training split.

    `classes` are the names by index (empty for regression); `class_counts` the labelled samples of
    each class (pixels for segmentation, positives for multilabel); `mean` and `std` describe a
    regression target in its `unit`.
    """

    kind: TaskKind
    classes: tuple[str, ...] = ()
    num_labelled: int = 0
    class_counts: tuple[int, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    minimum: float = 0.0
    maximum: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class HeadSpec:
    """The output a task asks of the model: `vector` is (B, C), `map` is (B, C, H, W)."""

    task: str
    layout: Literal["vector", "map"]
    num_outputs: int
