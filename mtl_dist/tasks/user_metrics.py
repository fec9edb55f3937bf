"""All metrics of a task: those of its kind, and those that a recipe adds, torchmetrics' own or the user's.

    tasks: {breed: {kind: classification, metrics: {top3: {kind: my_project.metrics.TopK, k: 3}}}}

Such a metric sees the labelled samples alone: those of torchmetrics in the form that each wants
(`library_metrics`), another one as `Task.metric_inputs` has it: logits (B, C) and classes, or labels, (B,) or
(B, C); values and targets (B,) in their unit; logits (B, C, H, W) and classes (B, H, W) at the mask's
resolution.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from mtl_dist.errors import UserError
from mtl_dist.tasks.accumulator import Accumulator
from mtl_dist.tasks.library_metrics import form_of
from mtl_dist.tasks.metric_states import Metric, State, has_states, merged, state_of, value_of
from mtl_dist.tasks.task import Task, UserMetricSettings
from mtl_dist.tasks.temperature import Calibrated

if TYPE_CHECKING:
    import torchmetrics

STANDARD = ""
"""The name of the metrics of the task's kind, among the parts."""


class AllMetrics:
    """A task's metrics and those that its recipe adds, as one.

    `gather` collects a value of every rank. `ranking` and `choosing` are `Task.metrics`' own; without `added`
    there are those of the kind alone.

    Raises:
        UserError: an added one cannot be made.
    """

    def __init__(
        self,
        task: Task,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        ranking: bool = True,
        choosing: bool = False,
        added: bool = True,
    ) -> None:
        self._task = task
        self._gather = gather
        choosing = choosing and task.rule is not None
        self._standard = task.metrics(ranking, choosing=True) if choosing else task.metrics(ranking)
        by_path = task.settings.metrics if added else {}
        self._own = {name: _built(task, name, own) for name, own in by_path.items()}
        self._forms = {name: form_of(metric, task, _where(task, name)) for name, metric in self._own.items()}

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        self._standard.update(output, target, labelled_B)
        if self._own and labelled_B.any():
            seen, wanted = self._task.metric_inputs(output.detach().float(), target)
            for name, metric in self._own.items():
                inputs, targets = self._forms[name](seen[labelled_B], wanted[labelled_B])
                if len(targets):
                    metric.update(inputs, targets)

    def compute(self) -> dict[str, float]:
        """Collective: the metrics over all ranks; what is asked of them after it is over all ranks too."""
        values = {} if has_states(self._standard) else self._standard.compute()
        return values | self.values(self.collected({}))

    def confusion_matrix(self) -> np.ndarray | None:
        return self._standard.confusion_matrix()

    def chosen_thresholds(self) -> tuple[float, ...]:
        """The thresholds chosen from what was counted, where the task was to choose."""
        return self._standard.chosen_thresholds() if isinstance(self._standard, Accumulator) else ()

    def per_class(self) -> list[dict[str, float]]:
        """The metrics of each class; none of a kind without classes or of the user's."""
        return self._standard.per_class() if isinstance(self._standard, Accumulator) else []

    def calibrate(self, temperature: float | None) -> None:
        """Let `calibrated` measure the probabilities at a temperature; None: at that which fits them."""
        if isinstance(self._standard, Accumulator):
            self._standard.calibrate(temperature)

    def calibrated(self) -> Calibrated | None:
        """The probabilities at a temperature; None where it was not asked or there are none."""
        return self._standard.calibrated() if isinstance(self._standard, Accumulator) else None

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
        """The metrics by name, those of the kind as `STANDARD` where they have states."""
        standard = {STANDARD: self._standard} if has_states(self._standard) else {}
        return standard | self._own

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that it computes."""
        standard = self.parts.get(STANDARD)
        return (*(() if standard is None else value_of(standard, [])), *self._own)

    def collected(self, earlier: Mapping[str, Sequence[State]]) -> dict[str, list[list[State]]]:
        """Collective: by part what each rank has counted, and before it `earlier`, what it had before."""
        collected = {}
        for name, metric in self.parts.items():
            own = state_of(metric)
            collected[name] = self._gather([*earlier.get(name, ()), *([] if own is None else [own])])
        return collected

    def values(self, collected: Mapping[str, Sequence[Sequence[State]]]) -> dict[str, float]:
        """The metrics of what was collected."""
        values: dict[str, float] = {}
        for name, metric in self.parts.items():
            states = merged(metric, [state for of_rank in collected[name] for state in of_rank])
            if name != STANDARD:
                values[name] = self._number(name, metric, states)
            else:
                values |= value_of(metric, states)
        return values

    def _number(self, name: str, metric: Metric, states: Sequence[State]) -> float:
        if not states:
            return math.nan
        return one_number(value_of(metric, states), _where(self._task, name))


def one_number(value: Any, where: str) -> float:
    """What a metric has computed.

    Raises:
        UserError: it is not one number.
    """
    advice = "Let its compute return their mean, or one of them."
    if not isinstance(value, Tensor | float | int | np.number):
        raise UserError(f"{where}: expected one number, found a {type(value).__name__}. {advice}")
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise UserError(f"{where}: expected one number, found {tensor.numel()}. {advice}")
    return float(tensor)


def try_metrics(task: Task) -> None:
    """Let the metrics that a recipe adds compute on a few made samples, before an epoch is spent on them.

    Raises:
        UserError: one is for another sort of task, cannot read the outputs, or computes no number.
    """
    example = task.example()
    if not task.settings.metrics or example is None:
        return
    output, target = example
    seen, wanted = task.metric_inputs(output, target)
    for name, settings in task.settings.metrics.items():
        where = _where(task, name)
        metric = _built(task, name, settings)
        inputs, targets = form_of(metric, task, where)(seen, wanted)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of made samples nothing odd is worth a word
                metric.update(inputs, targets)
                value = type(metric).compute(metric)
        except Exception as error:  # whatever a metric raises at what it cannot read
            raise UserError(
                f"{where}: expected a metric of {_shape(inputs)} and {_shape(targets)}, found "
                f"{type(error).__name__} in {settings.path}: {' '.join(str(error).split())}"
            ) from error
        one_number(value, where)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} ({', '.join(map(str, tensor.shape))})"


def _where(task: Task, name: str) -> str:
    return f"tasks.{task.name}.metrics.{name}"


def _built(task: Task, name: str, settings: UserMetricSettings) -> torchmetrics.Metric:
    try:
        metric: torchmetrics.Metric = settings.make(info=task.info)
    except (TypeError, ValueError) as error:
        raise UserError(f"{_where(task, name)}: expected arguments that fit, found: {error}") from error
    return metric
