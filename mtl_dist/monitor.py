"""The monitored metric: which evaluation was the best, when to lower the rate, when to stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mtl_dist.config.settings import Settings
from mtl_dist.optim import PlateauSchedule, Schedule

WEIGHTED_MEAN = "val/weighted_mean"
"""What a mean of several metrics is called, beside them."""


class MonitorSettings(Settings):
    """Which metric decides what "best" means."""

    metric: str = "val/loss"
    """`val/loss` (the weighted sum of the tasks' losses), `val/mean_accuracy`, `val/<task>/loss` or
    `val/<task>/<metric>`; with `train/` the same of the training steps."""
    mean: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """In place of `metric` the weighted mean of several, with their weights:
    {val/digit/accuracy: 2, val/size/accuracy: 1}."""
    mode: Literal["min", "max"] | None = None
    """null: as the metric wants (a loss is minimised, an accuracy maximised)."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without improvement; null: train to the end."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """The smallest change that counts as an improvement."""
    per_task: bool = False
    """Whether the best weights of each task, by the main metric of its kind, are kept as well:
    `mtl_dist.load(run, checkpoint="best/TASK")`."""

    @model_validator(mode="after")
    def _one_metric(self) -> MonitorSettings:
        # A run's own recipe states the default beside the mean.
        if self.mean is not None and self.metric != "val/loss":
            raise ValueError("expected metric or mean, found both. Remove one of them.")
        return self

    @property
    def name(self) -> str:
        """The metric that is followed."""
        return self.metric if self.mean is None else WEIGHTED_MEAN

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that it is made of."""
        return (self.metric,) if self.mean is None else tuple(self.mean)


@dataclass
class MonitorState:
    """What the monitor remembers between evaluations; part of the checkpoint."""

    best: float | None = None
    bad_evaluations: int = 0
    plateau_factor: float = 1.0
    plateau_waited: int = 0
    task_bests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task the step, metric and value of its best evaluation, where these are kept."""


class Monitor:
    """Follows one metric over the evaluations of a run."""

    def __init__(
        self,
        settings: MonitorSettings,
        mode: Literal["min", "max"],
        schedule: Schedule,
        task_modes: Mapping[str, Literal["min", "max"]] | None = None,
    ) -> None:
        self.metric = settings.name
        self._mean = settings.mean
        self._task_modes = task_modes or {}
        self.state = MonitorState()
        self._sign = 1.0 if mode == "max" else -1.0
        self._patience = settings.patience
        self._min_delta = settings.min_delta
        self._plateau = schedule if isinstance(schedule, PlateauSchedule) else None

    def of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metric that is followed, by its name; empty where a metric that it is of was not measured."""
        weights = {self.metric: 1.0} if self._mean is None else self._mean
        if not weights.keys() <= metrics.keys():
            return {}
        total = sum(weight * metrics[name] for name, weight in weights.items())
        return {self.metric: total / sum(weights.values())}

    def observe_tasks(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in one evaluation for each task whose best weights are kept, by `val/TASK/METRIC`."""
        for name, mode in self._task_modes.items():
            value, task = metrics.get(name, math.nan), name.partition("/")[2].rpartition("/")[0]
            sign, before = (1.0 if mode == "max" else -1.0), self.state.task_bests.get(task)
            if math.isfinite(value) and (before is None or sign * (value - before["value"]) > 0):
                self.state.task_bests[task] = {"step": step, "metric": name, "value": value}

    def observe(self, value: float) -> bool:
        """Take in one evaluation; true when it is the best so far. One that is not finite never is."""
        state = self.state
        better = math.isfinite(value) and (
            state.best is None or self._sign * (value - state.best) > self._min_delta
        )
        if better:
            state.best = value
            state.bad_evaluations = state.plateau_waited = 0
            return True
        state.bad_evaluations += 1
        state.plateau_waited += 1
        if self._plateau is not None and state.plateau_waited > self._plateau.patience:
            state.plateau_factor = max(self._plateau.minimum, state.plateau_factor * self._plateau.gamma)
            state.plateau_waited = 0
        return False

    def restart(self) -> None:
        """Forget the best value and the evaluations since, but not how far the rate was lowered."""
        self.state = MonitorState(plateau_factor=self.state.plateau_factor)

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._patience is not None and self.state.bad_evaluations >= self._patience

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = MonitorState(**state)
