"""What the pixels of a split are like, per channel: counted image by image, merged shard by shard.

Integers are counted by value, so that everything follows exactly from what was looked at. Of floats there
are moments, and a bounded number of values for the percentiles. Of an image of more than 128x128 pixels
every n-th row and column is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mtl_dist.data.manifest import PERCENTILES, PixelFacts

MOST_PIXELS = 1 << 14
"""Pixels that are looked at of an image; up to here all."""

_VALUES_OF_IMAGE, _VALUES_OF_SHARD = 1 << 10, 1 << 16
_INTEGERS = {"uint8": 1 << 8, "uint16": 1 << 16}


class PixelCounts:
    """What was seen of the images of one shard that have the same channels and type."""

    def __init__(self, channels: int, dtype: str) -> None:
        self.channels, self.dtype = channels, dtype
        self.num_images = 0
        self._counts = np.zeros((channels, _INTEGERS.get(dtype, 0)), np.int64)
        self._values: list[np.ndarray] = []
        self._moments = np.zeros((3, channels))  # number, mean, sum of squared deviations
        self._range = np.array([[math.inf], [-math.inf]]).repeat(channels, axis=1)

    def add(self, pixels: np.ndarray) -> None:
        """Look at an image (H, W, C)."""
        step = math.ceil(math.sqrt(max(1.0, pixels.shape[0] * pixels.shape[1] / MOST_PIXELS)))
        seen = pixels[step // 2 :: step, step // 2 :: step].reshape(-1, self.channels)
        self.num_images += 1
        if self.dtype in _INTEGERS:
            for channel in range(self.channels):
                found = np.bincount(seen[:, channel])
                self._counts[channel, : len(found)] += found
            return
        values = seen.astype(np.float64)
        mean = values.mean(axis=0)
        moments = np.stack(
            [np.full(self.channels, float(len(values))), mean, ((values - mean) ** 2).sum(axis=0)]
        )
        self._moments = _pooled(self._moments, moments)
        self._range = _wider(self._range, np.stack([values.min(axis=0), values.max(axis=0)]))
        self._values.append(seen[:: math.ceil(len(seen) / _VALUES_OF_IMAGE)])

    def state(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        head = {"channels": self.channels, "dtype": self.dtype, "num_images": self.num_images}
        if self.dtype in _INTEGERS:
            present = [np.flatnonzero(counts) for counts in self._counts]
            return head | {
                "values": [values.tolist() for values in present],
                "counts": [
                    counts[values].tolist() for counts, values in zip(self._counts, present, strict=True)
                ],
            }
        values = np.concatenate(self._values)
        return head | {
            "moments": self._moments.tolist(),
            "range": self._range.tolist(),
            "values": values[:: math.ceil(values.size / _VALUES_OF_SHARD)].T.tolist(),
        }


def pixel_facts(states: Iterable[dict[str, Any]], channels: int) -> PixelFacts | None:
    """What the states of all shards say of a dataset of so many channels; grey counts in each of three."""
    states = [state for state in states if state["num_images"]]
    if not states:
        return None
    rows = [_channel_facts(states, channel) for channel in range(channels)]
    mean, std, minimum, maximum, *shares = (tuple(column) for column in zip(*rows, strict=True))
    return PixelFacts(
        mean=mean,
        std=std,
        minimum=minimum,
        maximum=maximum,
        percentiles=tuple(shares),
        num_images=sum(state["num_images"] for state in states),
    )


def _channel_facts(states: list[dict[str, Any]], channel: int) -> tuple[float, ...]:
    """Mean, deviation, range and percentiles of one channel."""
    values, weights = list[np.ndarray](), list[np.ndarray]()
    moments = np.zeros((3, 1))
    limits = np.array([[math.inf], [-math.inf]])
    for state in states:
        at = min(channel, state["channels"] - 1)
        values.append(np.array(state["values"][at], np.float64))
        if "counts" in state:
            weights.append(np.array(state["counts"][at], np.float64))
            continue
        column = np.array(state["moments"])[:, at : at + 1]
        weights.append(np.full(len(values[-1]), column[0, 0] / len(values[-1])))
        moments = _pooled(moments, column)
        limits = _wider(limits, np.array(state["range"])[:, at : at + 1])
    value, weight = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(value, kind="stable")
    value, weight = value[order], weight[order]
    if not moments[0, 0]:
        mean = float(np.average(value, weights=weight))
        moments = np.array([[weight.sum()], [mean], [(weight * (value - mean) ** 2).sum()]])
        limits = np.array([[value[0]], [value[-1]]])
    below = np.cumsum(weight)
    at_shares = np.searchsorted(below, below[-1] * np.array(PERCENTILES) / 100)
    std = math.sqrt(moments[2, 0] / moments[0, 0])
    found = (moments[1, 0], std, limits[0, 0], limits[1, 0], *value[np.minimum(at_shares, len(value) - 1)])
    return tuple(float(f"{number:.7g}") for number in found)


def _pooled(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number, mean and sum of squared deviations of two parts together (Chan, Golub and LeVeque, 1979)."""
    number = a[0] + b[0]
    apart = b[1] - a[1]
    return np.stack([number, a[1] + apart * b[0] / number, a[2] + b[2] + apart**2 * a[0] * b[0] / number])


def _wider(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])])
