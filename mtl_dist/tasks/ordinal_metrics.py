"""The metrics of grades, from a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mtl_dist.tasks.accumulator import Accumulator
from mtl_dist.tasks.class_metrics import count_pairs, of_decisions


class OrdinalMetrics(Accumulator):
    """mae is the mean distance in steps; kappa is Cohen's with quadratic weights, NaN where neither labels
    nor answers vary; within_one is the fraction of answers at most one step off."""

    confusion: Tensor

    def __init__(self, grades: Callable[[Tensor], Tensor], num_classes: int) -> None:
        super().__init__()
        self._grades = grades
        self._num_classes = num_classes
        self.add_sum("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count outputs (B, C - 1) against grades (B,)."""
        found_B = self._grades(output)
        self.confusion += count_pairs(target[None], found_B[None], labelled_B[None], self._num_classes)

    def metrics(self) -> dict[str, float]:
        self._confusion = self.confusion.cpu().numpy().copy()
        counts_CC = self.confusion.double()
        self._per_class = of_decisions(counts_CC.diagonal(), counts_CC.sum(dim=1), counts_CC.sum(dim=0))
        num = float(counts_CC.sum())
        grades_C = torch.arange(self._num_classes, dtype=torch.float64, device=counts_CC.device)
        steps_CC = (grades_C[:, None] - grades_C).abs()
        squared = float((counts_CC * steps_CC.square()).sum())
        by_chance = float((counts_CC.sum(dim=1)[:, None] * counts_CC.sum(dim=0) * steps_CC.square()).sum())
        if not num:
            return dict.fromkeys(("mae", "kappa", "within_one", "accuracy"), math.nan) | {"num_samples": 0.0}
        return {
            "mae": float((counts_CC * steps_CC).sum()) / num,
            "kappa": 1 - squared * num / by_chance if by_chance else math.nan,
            "within_one": float(counts_CC[steps_CC <= 1].sum()) / num,
            "accuracy": float(counts_CC.diagonal().sum()) / num,
            "num_samples": num,
        }
