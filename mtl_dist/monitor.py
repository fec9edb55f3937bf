"""The monitored metric: which evaluation was the best, when to lower the rate, when to stop early."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mtl_dist.config.settings import Settings
from mtl_dist.optim import PlateauSchedule, Schedule


class MonitorSettings(Settings):
    """Which metric decides what "best" means."""

    metric: str = "val/loss"
    """`val/loss` (the weighted sum of the tasks' losses), `val/mean_accuracy`, `val/<task>/loss` or
    `val/<task>/<metric>`."""
    mode: Literal["min", "max"] | None = None
    """null: as the metric wants (a loss is minimised, an accuracy maximised)."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without improvement; null: train to the end."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """The smallest change that counts as an improvement."""


@dataclass
class MonitorState:
    """What the monitor remembers between evaluations; part of the checkpoint."""

    best: float | None = None
    bad_evaluations: int = 0
    plateau_factor: float = 1.0
    plateau_waited: int = 0


class Monitor:
    """Follows one metric over the evaluations of a run."""

    def __init__(self, settings: MonitorSettings, mode: Literal["min", "max"], schedule: Schedule) -> None:
        self.metric = settings.metric
        self.state = MonitorState()
        self._sign = 1.0 if mode == "max" else -1.0
        self._patience = settings.patience
        self._min_delta = settings.min_delta
        self._plateau = schedule if isinstance(schedule, PlateauSchedule) else None

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

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._patience is not None and self.state.bad_evaluations >= self._patience

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = MonitorState(**state)
