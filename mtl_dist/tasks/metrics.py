"""What the metrics of a task are, whoever computes them; the built-in kinds have theirs in `*_metrics`.

This module loads without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MEAN_ACCURACY = "mean_accuracy"
"""The mean over the tasks that have an accuracy; of a split, beside its loss."""
PER_CLASS = "per_class"
"""The metrics of each class, among those of a task."""


def mean_accuracy(split: str, tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`SPLIT/mean_accuracy` of the tasks' metrics; nothing where no task has an accuracy."""
    accuracies = [values["accuracy"] for values in tasks.values() if "accuracy" in values]
    return {f"{split}/{MEAN_ACCURACY}": float(np.mean(accuracies))} if accuracies else {}


class TaskMetrics(Protocol):
    """The metrics of one task over one pass through a split.

    Those of several ranks are merged by `user_metrics.AllMetrics`, from the states of an `Accumulator` or of
    a metric of torchmetrics. Anything else merges itself: then `compute` and `confusion_matrix` are
    collective, and every rank calls them, also one that saw no label of the task.
    """

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count the labelled samples of one batch; the others leave no trace."""

    def compute(self) -> dict[str, float]:
        """The metrics, in the order of the settings' `modes`, and `num_samples`: labels.

        NaN where a metric is undefined: no label, an AUROC of one class, an R2 of one sample.
        """

    def confusion_matrix(self) -> np.ndarray | None:
        """The (C, C) int64 counts, rows true, columns predicted; None where there are no classes.

        Samples for classification, pixels for segmentation.
        """

    def to(self, device: torch.device) -> Self:
        """The same metrics, kept on `device`."""

    def reset(self) -> None:
        """Forget everything counted."""
