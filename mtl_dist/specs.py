"""What the packages of layer 1 exchange: a task's facts and a head's shape.

Data learns a `TaskInfo` from the dataset, a task turns it into a `HeadSpec`, and a model builds the
head. None of the three imports another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

IGNORE = 255
"""The mask value that says "no label for this pixel"."""

NO_CLASS = -1
"""The class that says "no label" in a column of classes."""


@dataclass(frozen=True)
class TaskInfo:
    """What a dataset knows of one task, from the labels of its training split.

    `kind` names what its labels are (see `kinds`; of a user-defined kind the import path). `classes` are
    the names by index, empty where there are none; `class_counts` the labelled samples of each class (the
    pixels where labels are maps); `mean`, `std` and range describe numbers in their `unit`; `facts` is
    what else a kind has to know, as JSON holds it.
    """

    kind: str
    classes: tuple[str, ...] = ()
    num_labelled: int = 0
    class_counts: tuple[int, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    minimum: float = 0.0
    maximum: float = 0.0
    unit: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """The deviation of the labels: 0 where all are one number. `std`, which divides them, is 1 there."""
        is_one = self.minimum == self.maximum and math.isclose(self.mean, self.minimum, rel_tol=1e-6)
        return 0.0 if is_one and self.num_labelled else self.std

    @property
    def is_counted(self) -> bool:
        """Whether there are labels, and it is known how many each class has; not so of one named later."""
        return self.num_labelled > 0 and len(self.class_counts) == len(self.classes)


@dataclass(frozen=True)
class HeadSpec:
    """The output a task asks of the model: `vector` is (B, C), `map` is (B, C, H, W)."""

    task: str
    layout: Literal["vector", "map"]
    num_outputs: int
