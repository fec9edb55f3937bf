"""What takes a run's rows: the contract of every sink, built in or user-defined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of a run's record.

    kind     "step" (a logged step), "epoch" (an epoch's means and its evaluation) or "balance" (the tasks'
             gradients compared)
    step     completed optimizer steps, and `epoch` as the data defines it, with its fraction
    time     seconds since 1970
    metrics  by name; NaN where one is undefined. The name holds what it is over: `step/loss` is one global
             batch's, `train/loss` the mean over an epoch, `val/loss` an evaluation's
    """

    kind: str
    step: int
    epoch: float
    time: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class SkippedStep:
    """A step that was skipped, because a loss or a gradient was not finite.

    step    its number, and `epoch` as in a row
    tasks   those whose loss was not finite; none where only the gradient was not
    images  the keys of the samples whose image has NaN or infinity, where one has
    keys    those of all samples of the step
    """

    step: int
    epoch: float
    tasks: tuple[str, ...]
    images: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class RunFacts:
    """What a sink may know of its run.

    directory     the run folder
    name          the recipe's, for grouping runs; `run_id` is this run's own, the same after every resume
    recipe        the resolved recipe as plain data
    resumed_step  the step from which this start goes on; 0 for a new run
    rewritten     (kind, step) of the rows after `resumed_step` that an earlier start had given out: they come
                  again with the same metrics, and a sink that cannot delete passes over them
    """

    directory: Path
    name: str = "run"
    run_id: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    resumed_step: int = 0
    rewritten: frozenset[tuple[str, int]] = frozenset()


class Sink(ABC):
    """Takes the rows of a run on rank 0. Whatever it raises switches it off and never hurts the run.

    It is opened by its constructor; one that cannot delete what a resumed run writes again looks into
    `RunFacts.rewritten`.
    """

    @abstractmethod
    def row(self, row: Row) -> None:
        """One row, as soon as it is there."""

    def skipped(self, skipped: SkippedStep) -> None:
        """A step that was not finite, and so was not made."""
        del skipped

    def text(self, line: str) -> None:
        """A line for people, as the terminal shows it."""
        del line

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG of the run folder, when the run has ended."""
        del name, path, step

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of the best weights, as in `best/test/digit/accuracy`, when the run has ended."""
        del metrics, step

    def close(self) -> None:
        """The last call."""
        return
