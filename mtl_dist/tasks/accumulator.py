"""What the metrics of all built-in kinds share: what is counted, by name, and what is computed from it.

Not on the ground of torchmetrics, which takes four seconds of a processor to import, in every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mtl_dist.tasks.temperature import Calibrated

Counted: TypeAlias = Tensor | list[Tensor]
"""A state: a tensor, which is added to, or a list, which grows."""
Way = Literal["sum", "cat", "max", "min"]
"""How states of several parts become one."""


class Accumulator(ABC):
    """`TaskMetrics` from named states: those of several parts, of ranks or of starts of a run, become one
    (`metric_states`), so that what is computed from them does not depend on the parts.

    A subclass names its states at its beginning (`add_sum`, `add_list`), adds to them in `count`, and says
    what they amount to in `metrics`. Both run without gradients.
    """

    def __init__(self) -> None:
        self.ways: dict[str, Way] = {}
        """How each state is merged."""
        self.has_counted = False
        self.device = torch.device("cpu")
        self._defaults: dict[str, Counted] = {}
        self._metrics: dict[str, float] | None = None
        self._confusion: np.ndarray | None = None
        self._chosen: tuple[float, ...] = ()
        self._per_class: list[dict[str, float]] = []
        self._calibrates = False
        self._temperature: float | None = None
        self._calibrated: Calibrated | None = None

    def add_sum(self, name: str, zeros: Tensor) -> None:
        """Name a state that is added to, and over parts."""
        self.ways[name], self._defaults[name] = "sum", zeros
        setattr(self, name, zeros.clone())

    def add_list(self, name: str, empty: Tensor) -> None:
        """Name a list of tensors like `empty`, which has no row; those of parts follow one another."""
        self.ways[name], self._defaults[name] = "cat", [empty]
        setattr(self, name, [empty])

    @abstractmethod
    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Add the labelled samples of a batch to the states, without waiting for the device."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The metrics of what the states hold."""

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count the labelled samples of one batch; the others leave no trace."""
        self.has_counted, self._metrics = True, None
        self.count(output, target, labelled_B)

    def compute(self) -> dict[str, float]:
        """The metrics of what was counted, or of what was last merged with it."""
        return dict(self.recompute() if self._metrics is None else self._metrics)

    @torch.no_grad()
    def recompute(self) -> dict[str, float]:
        """The metrics of what the states hold now."""
        self._metrics = self.metrics()
        return self._metrics

    def of_one(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """The metrics of one labelled sample."""
        self.update(output, target, torch.ones(1, dtype=torch.bool, device=output.device))
        return self.compute()

    def confusion_matrix(self) -> np.ndarray | None:
        """The counts, as `compute` saw them."""
        self.compute()
        return self._confusion

    def chosen_thresholds(self) -> tuple[float, ...]:
        """The thresholds that `compute` has chosen; none where it was not to."""
        self.compute()
        return self._chosen

    def per_class(self) -> list[dict[str, float]]:
        """The metrics of each class, NaN where undefined; none where there are no classes."""
        self.compute()
        return self._per_class

    def calibrate(self, temperature: float | None) -> None:
        """Let `compute` measure the probabilities at a temperature too; None: at that which fits them."""
        self._calibrates, self._temperature, self._metrics = True, temperature, None

    def calibrated(self) -> Calibrated | None:
        """The probabilities at a temperature; None where it was not asked or there are none."""
        self.compute()
        return self._calibrated

    # ------------------------------------------------------------------ states
    def states(self) -> dict[str, Counted]:
        """What was counted, by name."""
        return {name: getattr(self, name) for name in self.ways}

    def hold(self, states: dict[str, Counted]) -> None:
        """Put states into the place of those that are there, on this device."""
        self._metrics = None
        for name, value in states.items():
            setattr(self, name, moved(value, self.device))

    def to(self, device: torch.device) -> Self:
        self.device = device
        self.hold(self.states())
        return self

    def reset(self) -> None:
        """Forget everything counted."""
        self.hold({name: list(v) if isinstance(v, list) else v.clone() for name, v in self._defaults.items()})
        self.has_counted = False


def moved(value: Counted, device: torch.device) -> Counted:
    return [tensor.to(device) for tensor in value] if isinstance(value, list) else value.to(device)


def joined(tensors: list[Tensor]) -> Tensor:
    """The rows of all of them, one after the other."""
    return torch.cat([torch.atleast_1d(tensor) for tensor in tensors])
