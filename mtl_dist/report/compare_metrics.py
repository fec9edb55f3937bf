"""The arithmetic of `mtl compare`: mean and spread over seeds, and how much worse than single-task models.

A relative drop is that of one metric against the mean of the single-task models, in per cent, positive where
it is worse, whichever direction the metric has:

    drop = 100 (-1)^l (M - B) / |B|,    l = 1 where larger is better

It is averaged in three ways that the literature all calls delta_m; the same row can be -3.9 in one and -7.4
in another, so they are named:

    delta_m over main metrics   one metric per task, mean over tasks: Maninis et al.
                                (https://arxiv.org/abs/1904.08918), Vandenhende et al.
                                (https://arxiv.org/abs/2004.13379); there with the sign of a gain
    delta_m over tasks          the mean over tasks of the mean over each task's metrics: LibMTL
                                (https://github.com/median-research-group/LibMTL), with the sign of a gain
    delta_m over metrics        the mean over all metrics of all tasks: CAGrad, Nash-MTL and FAMO
                                (https://arxiv.org/abs/2110.14048), with this sign
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mtl_dist.figures.conflicts import Conflicts
from mtl_dist.tasks.task import Mode

CONTROL = "equal"
SINGLE = "single-task"

Metrics = Mapping[str, Mapping[str, float]]
"""By task and metric."""

Compared: TypeAlias = Mapping[str, Mapping[str, Mode]]
"""By task the metrics that are compared, the main one first, and which way each is better."""

CONVENTIONS = ("main metrics", "tasks", "metrics")


@dataclass(frozen=True)
class Spread:
    """A metric over seeds: mean and sample standard deviation (of one value NaN) of those that are known."""

    values: tuple[float, ...]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.known) if self.known else math.nan

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.known) if len(self.known) > 1 else math.nan


@dataclass(frozen=True)
class Row:
    """What one way to train reached, over the seeds that came to an end.

    delta_m           by convention; of single-task models there is none
    seconds_per_image of training steps; `peak_memory` in bytes, of the largest process. Single-task models
                      cost the sum of their times and the largest of their memories.
    """

    name: str
    num_runs: int
    metrics: Mapping[str, Mapping[str, Spread]]
    delta_m: Mapping[str, Spread]
    seconds_per_image: Spread
    peak_memory: Spread


@dataclass(frozen=True)
class Comparison:
    """All rows: single-task models, equal weights, the methods; measured on `split`."""

    compared: Compared
    split: str
    seeds: Sequence[int]
    rows: Sequence[Row]
    conflicts: Mapping[str, Conflicts]
    failures: Mapping[str, str]
    notes: Sequence[str]

    @property
    def control(self) -> Row:
        return next(row for row in self.rows if row.name == CONTROL)

    def time_ratio(self, row: Row) -> float:
        """Time per image in parts of that with equal weights."""
        return row.seconds_per_image.mean / self.control.seconds_per_image.mean

    def memory_ratio(self, row: Row) -> float:
        return row.peak_memory.mean / self.control.peak_memory.mean


def relative_drop(mode: Mode, value: float, base: float) -> float:
    """By how many per cent `value` is worse than `base`; NaN where `base` is 0."""
    if base == 0:
        return math.nan
    sign = -1 if mode == "max" else 1
    return 100 * sign * (value - base) / abs(base)


def delta_m(found: Metrics, base: Metrics, compared: Compared) -> dict[str, float]:
    """The three averages of relative drops, by convention; metrics that are undefined in either are left out.

    A task that has none left, or no main metric, makes the averages over tasks undefined.
    """
    drops: dict[str, dict[str, float]] = {}
    for task, modes in compared.items():
        all_drops = {
            metric: relative_drop(mode, found[task][metric], base[task][metric])
            for metric, mode in modes.items()
        }
        drops[task] = {metric: drop for metric, drop in all_drops.items() if math.isfinite(drop)}
    main = [drops[task].get(next(iter(modes)), math.nan) for task, modes in compared.items()]
    by_task = [_mean(list(own.values())) for own in drops.values()]
    every = [drop for own in drops.values() for drop in own.values()]
    return dict(zip(CONVENTIONS, (_mean(main), _mean(by_task), _mean(every)), strict=True))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def spreads(runs: Sequence[Metrics], compared: Compared) -> dict[str, dict[str, Spread]]:
    """Every compared metric over runs."""
    return {
        task: {metric: Spread(tuple(run[task][metric] for run in runs)) for metric in modes}
        for task, modes in compared.items()
    }


def means(metrics: Mapping[str, Mapping[str, Spread]]) -> dict[str, dict[str, float]]:
    return {task: {metric: spread.mean for metric, spread in own.items()} for task, own in metrics.items()}
