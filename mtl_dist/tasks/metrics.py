"""The names of the metrics and what is wanted of them; `accumulators` computes them.

This module loads without torchmetrics, which takes seconds to import, so that a recipe is checked fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np

from mtl_dist.config.errors import suggest
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.specs import TaskKind

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["max", "min"]

_MODES: dict[TaskKind, dict[str, Mode]] = {
    "classification": {
        "accuracy": "max",
        "balanced_accuracy": "max",
        "precision": "max",
        "recall": "max",
        "f1": "max",
        "auroc": "max",
    },
    "multilabel": {
        "accuracy": "max",
        "precision": "max",
        "recall": "max",
        "f1": "max",
        "auroc": "max",
        "mean_average_precision": "max",
    },
    "regression": {"mae": "min", "rmse": "min", "mse": "min", "r2": "max"},
    "segmentation": {"dice": "max", "iou": "max", "pixel_accuracy": "max"},
}


MEAN_ACCURACY = "mean_accuracy"
"""The mean over the tasks that have an accuracy; of a split, beside its loss."""


class TaskMetrics(Protocol):
    """The metrics of one task over one pass through a split.

    `compute` and `confusion_matrix` are collective where a process group stands: every rank must call them,
    also a rank that saw no label of the task.
    """

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count the labelled samples of one batch; the others leave no trace."""

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks, in the order of `metric_names`, and `num_samples`, the labels counted.

        NaN where a metric is undefined: no label, an AUROC of one class, an R2 of one sample.
        """

    def confusion_matrix(self) -> np.ndarray | None:
        """The (C, C) int64 counts over all ranks, rows true, columns predicted; None where there are no
        classes.

        Samples for classification, pixels for segmentation.
        """

    def to(self, device: torch.device) -> Self:
        """The same metrics, kept on `device`."""

    def reset(self) -> None:
        """Forget everything counted."""


def metric_names(kind: TaskKind) -> tuple[str, ...]:
    """What `TaskMetrics.compute` reports for a kind of task, beside `num_samples`."""
    return tuple(_MODES[kind])


def mode_of(metric: str) -> Mode:
    """Whether larger or smaller is better, by a metric's name (`auroc`) or path (`val/diagnosis/auroc`).

    Raises:
        UserError: no such metric.
    """
    modes: dict[str, Mode] = {"loss": "min", MEAN_ACCURACY: "max"}
    for named in _MODES.values():
        modes |= named
    name = metric.rsplit("/", 1)[-1]
    if name not in modes:
        raise UserError(
            f"{metric}: expected a metric, found {name!r}. {suggest(name, modes, 'Known metrics')}"
        )
    return modes[name]
