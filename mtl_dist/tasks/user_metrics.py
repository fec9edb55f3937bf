"""All metrics of a task: those of its kind, and those that a recipe adds, torchmetrics' own or the user's.

    tasks: {breed: {kind: classification, metrics: {top3: {kind: my_project.metrics.TopK, k: 3}}}}

Such a metric sees the labelled samples alone: logits (B, C) and classes, or labels, (B,) or (B, C); values
and targets (B,) in their unit; logits (B, C, H, W) and classes (B, H, W) at the mask's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from mtl_dist.errors import UserError
from mtl_dist.tasks.accumulators import Accumulator
from mtl_dist.tasks.metric_states import State, merged, state_of, value_of
from mtl_dist.tasks.task import Task, UserMetricSettings

STANDARD = ""
"""The name of the metrics of the task's kind, among the parts."""


class AllMetrics:
    """A task's metrics and those that its recipe adds, as one.

    `gather` collects a value of every rank. `ranking` and `choosing` are `Task.metrics`' own.

    Raises:
        UserError: an added one cannot be made.
    """

    def __init__(
        self,
        task: Task,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        ranking: bool = True,
        choosing: bool = False,
    ) -> None:
        self._task = task
        self._gather = gather
        choosing = choosing and task.rule is not None
        self._standard = task.metrics(ranking, choosing=True) if choosing else task.metrics(ranking)
        self._own = {name: _built(task, name, own) for name, own in task.settings.metrics.items()}

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        self._standard.update(output, target, labelled_B)
        if self._own and labelled_B.any():
            seen, wanted = self._task.metric_inputs(output.detach().float(), target)
            for metric in self._own.values():
                metric.update(seen[labelled_B], wanted[labelled_B])

    def compute(self) -> dict[str, float]:
        """Collective: the metrics over all ranks."""
        values = self._standard.compute()
        for name, metric in self._own.items():
            states = [state for state in self._gather(state_of(metric)) if state is not None]
            values[name] = self._number(name, metric, states)
        return values

    def confusion_matrix(self) -> np.ndarray | None:
        return self._standard.confusion_matrix()

    def chosen_thresholds(self) -> tuple[float, ...]:
        """Collective: the thresholds chosen from what was counted, where the task was to choose."""
        return self._standard.chosen_thresholds() if isinstance(self._standard, Accumulator) else ()

    def to(self, device: torch.device) -> Self:
        self._standard = self._standard.to(device)
        self._own = {name: metric.to(device) for name, metric in self._own.items()}
        return self

    def reset(self) -> None:
        self._standard.reset()
        for metric in self._own.values():
            metric.reset()

    # ------------------------------------------------------------------ as parts of a longer pass
    @property
    def parts(self) -> dict[str, Metric]:
        """The metrics by name, those of the kind as `STANDARD` where they are a torchmetrics metric."""
        standard = {STANDARD: self._standard} if isinstance(self._standard, Metric) else {}
        return standard | self._own

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that it computes."""
        standard = self.parts.get(STANDARD)
        return (*(() if standard is None else type(standard).compute(standard)), *self._own)

    def collected(self, earlier: Mapping[str, Sequence[State]]) -> dict[str, list[State]]:
        """Collective: by part what all ranks have counted, and `earlier` what one had before."""
        collected = {}
        for name, metric in self.parts.items():
            own = state_of(metric)
            everything = self._gather([*earlier.get(name, ()), *([] if own is None else [own])])
            collected[name] = merged(metric, [state for states in everything for state in states])
        return collected

    def values(self, collected: Mapping[str, Sequence[State]]) -> dict[str, float]:
        """The metrics of what was collected."""
        values: dict[str, float] = {}
        for name, metric in self.parts.items():
            states = collected[name]
            if name != STANDARD:
                values[name] = self._number(name, metric, states)
            else:  # where nothing was counted all of them are NaN
                values |= value_of(metric, states) if states else type(metric).compute(metric)
        return values

    def _number(self, name: str, metric: Metric, states: Sequence[State]) -> float:
        if not states:
            return math.nan
        value = torch.as_tensor(value_of(metric, states))
        if value.numel() != 1:
            raise UserError(
                f"tasks.{self._task.name}.metrics.{name}: expected one number, found {value.numel()}. "
                "Let its compute return their mean, or one of them."
            )
        return float(value)


def _built(task: Task, name: str, settings: UserMetricSettings) -> Metric:
    metric: Metric = settings.make(info=task.info)
    return metric
