"""Metrics that a recipe adds to a task: torchmetrics' own, or the user's, by import path.

    tasks: {breed: {kind: classification, metrics: {top3: {kind: my_project.metrics.TopK, k: 3}}}}

Such a metric sees the labelled samples alone: logits (B, C) and classes, or labels, (B,) or (B, C); values
and targets (B,) in their unit; logits (B, C, H, W) and classes (B, H, W) at the mask's resolution.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from mtl_dist.errors import UserError
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.task import Task, UserMetricSettings


def all_metrics(task: Task) -> TaskMetrics:
    """A task's metrics and those that its recipe adds.

    Raises:
        UserError: an added one has the name of another metric, or could not be merged over ranks.
    """
    return _WithOwn(task) if task.settings.metrics else task.metrics()


class _WithOwn:
    """Both, as one."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._standard = task.metrics()
        self._own = {name: _built(task, name, own) for name, own in task.settings.metrics.items()}

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        self._standard.update(output, target, labelled_B)
        if labelled_B.any():
            seen, wanted = self._task.metric_inputs(output.detach().float(), target)
            for metric in self._own.values():
                metric.update(seen[labelled_B], wanted[labelled_B])

    def compute(self) -> dict[str, float]:
        metrics = self._standard.compute()
        for name, metric in self._own.items():
            # A rank without a label takes part with its empty sums; torchmetrics would warn of it.
            metric._update_count = max(metric._update_count, 1)
            value = torch.as_tensor(metric.compute())
            if value.numel() != 1:
                raise UserError(
                    f"tasks.{self._task.name}.metrics.{name}: expected one number, found {value.numel()}. "
                    "Let its compute return their mean, or one of them."
                )
            metrics[name] = float(value) if metrics["num_samples"] else math.nan
        return metrics

    def confusion_matrix(self) -> np.ndarray | None:
        return self._standard.confusion_matrix()

    def to(self, device: torch.device) -> Self:
        self._standard = self._standard.to(device)
        self._own = {name: metric.to(device) for name, metric in self._own.items()}
        return self

    def reset(self) -> None:
        self._standard.reset()
        for metric in self._own.values():
            metric.reset()


def _built(task: Task, name: str, settings: UserMetricSettings) -> Metric:
    where = f"tasks.{task.name}.metrics.{name}"
    metric: Metric = settings.make(info=task.info)
    lists = [state for state, default in metric._defaults.items() if isinstance(default, list)]
    if lists:
        raise UserError(
            f"{where}: expected states that are sums, which ranks without a label can add to, found the list "
            f"{lists[0]}. Use a metric with sums (of torchmetrics' curves: with thresholds)."
        )
    return metric
