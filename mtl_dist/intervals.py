"""How sure the metrics of a split are: 95% intervals by the bootstrap over its samples.

Percentiles of the metrics of samples drawn again, with replacement (Efron, Bootstrap Methods: Another Look at
the Jackknife, 1979): what other samples of the same kind would have given for these weights. Not what another
training would have given; seeds show that (`mtl compare --seeds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np

from mtl_dist.tasks.task import Task

Interval: TypeAlias = tuple[float, float]

DRAWS = 1000
_FEWEST = 5
"""Samples below which nothing is said."""
_MOST_SORTED = 2e8
"""Draws x samples x classes beyond which the metrics of an order get no interval."""
_AT_ONCE = 4_000_000


def intervals(task: Task, columns: Mapping[str, np.ndarray], draws: int = DRAWS) -> dict[str, Interval]:
    """Low and high of each metric of a task that its `columns` (of labelled samples) determine."""
    num = len(next(iter(columns.values()), ()))
    if num < _FEWEST:
        return {}
    ranking = draws * num * max(1, len(task.info.classes)) <= _MOST_SORTED
    blocks = [task.resampled(columns, weights_RN, ranking) for weights_RN in _weights(num, draws)]
    found = {}
    for name in blocks[0]:
        values_R = np.concatenate([block[name] for block in blocks])
        values_R = values_R[np.isfinite(values_R)]
        if len(values_R) > draws / 2:
            low, high = np.percentile(values_R, (2.5, 97.5))
            found[name] = float(low), float(high)
    return found


def _weights(num: int, draws: int) -> Iterator[np.ndarray]:
    """How often each sample was drawn, a few draws at a time, always the same."""
    generator = np.random.default_rng(0)
    rows = max(1, min(draws, _AT_ONCE // num))
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        drawn = generator.integers(0, num, size=(size, num)) + num * np.arange(size)[:, None]
        counts: np.ndarray = np.bincount(drawn.ravel(), minlength=size * num).reshape(size, num)
        yield counts.astype(np.float64)
