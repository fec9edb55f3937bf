"""Number, mean, squared deviation and range of values, as arrays that can be added."""

from __future__ import annotations

import math

import numpy as np

NO_VALUES = (0.0, 0.0, 0.0, math.inf, -math.inf)
"""The moments of nothing: number, mean, sum of squared deviations from it, smallest, largest."""


def moments_of(values: np.ndarray) -> np.ndarray:
    """The moments (5,) of an array's finite values."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return np.array(NO_VALUES)
    mean = finite.mean()
    return np.array([finite.size, mean, np.square(finite - mean).sum(), finite.min(), finite.max()])


def pooled(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The moments of both together, to rounding also where their means are far from 0."""
    num = one[0] + other[0]
    if not num:
        return one
    apart = other[1] - one[1]
    return np.array(
        [
            num,
            one[1] + apart * other[0] / num,
            one[2] + other[2] + apart * apart * one[0] * other[0] / num,
            min(one[3], other[3]),
            max(one[4], other[4]),
        ]
    )


def deviation(moments: np.ndarray) -> float:
    """The standard deviation; 1 of values that do not vary: a target must not be divided by 0."""
    variance = moments[2] / moments[0] if moments[0] else 0.0
    return math.sqrt(variance) if variance > 0 else 1.0
