"""Which source the draw at each position comes from: a schedule that is fair over every prefix.

Source s has an integer weight w_s out of W = sum of the weights, so the first p draws should hold
p * w_s / W draws of it. The schedule gives each source the floor or the ceiling of that, for every p:
the realised fraction is always less than one sample from the wanted one.

It is earliest-deadline-first: the k-th draw of s (from 1) may come at position floor((k - 1) W / w_s) at
the earliest, and must come before position ceil(k W / w_s). As the weights fill every position exactly,
taking the pending draw with the earliest deadline never misses one (Baruah, Cohen, Plaxton and Varvel,
Proportionate progress, 1996; the chairman assignment problem of Tijdeman, 1980). After W positions every
source has had exactly w_s draws, and the schedule repeats.

That rule is a loop over positions, but we need to begin anywhere. A server that is never idle has finished,
of the jobs of a priority class, min over t <= p of (those released before t) + p - t by time p. Applied to
the classes "the i draws due first" this says which draws in progress are done at p, from positions back to
the oldest release among them: a vectorised look at up to W / min(w_s) positions, usually a few, and no
table (`Schedule._state_at`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_dist.data.order import Order
from mtl_dist.errors import UserError

_RESOLUTION = 2**30  # real weights are rounded to this many parts: off by one sample in a billion draws
_MAX_PERIOD = 3 * 10**9  # W squared must fit into an int64
_FIRST_SCAN, _LONGEST_SCAN = 64, 16384  # positions looked at in one go


@dataclass(frozen=True)
class SourceDraws:
    """Consecutive positions of a stream: the source of each, and which draw of that source it is."""

    sources: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class Samples:
    """Positions of a stream: the source of each, the source's own epoch, and the row."""

    sources: np.ndarray
    epochs: np.ndarray
    rows: np.ndarray

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(source, epoch, row) of each position."""
        return zip(self.sources.tolist(), self.epochs.tolist(), self.rows.tolist(), strict=True)


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Real weights as integers: their shares to within one part in a billion, and never 0."""
    total = math.fsum(weights)
    return tuple(max(1, round(weight / total * _RESOLUTION)) for weight in weights)


class Schedule:
    """Interleaves the draws of several sources in proportion to integer weights.

    Raises:
        UserError: the weights add up to more than the exact arithmetic can hold.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        assert weights and min(weights) > 0
        divisor = math.gcd(*weights)
        self.weights = tuple(weight // divisor for weight in weights)
        self.period = sum(self.weights)
        if self.period > _MAX_PERIOD:
            raise UserError(
                f"data.mixing: expected at most {_MAX_PERIOD:,} samples to mix in proportion, found "
                f"{self.period:,}. Use `mixing: {{kind: weights}}`."
            )

    def draws(self, start: int, stop: int) -> SourceDraws:
        """The draws at positions [start, stop)."""
        if len(self.weights) == 1:
            return SourceDraws(np.zeros(stop - start, dtype=np.int64), np.arange(start, stop))
        sources, numbers = np.empty((2, stop - start), dtype=np.int64)
        rounds = start // self.period
        done = [n - rounds * weight for n, weight in zip(self.counts(start), self.weights, strict=True)]
        release, deadline = self._windows(done)
        for index, position in enumerate(range(start - rounds * self.period, stop - rounds * self.period)):
            pending = (source for source, first in enumerate(release) if first <= position)
            source = min(pending, key=deadline.__getitem__)
            sources[index] = source
            numbers[index] = done[source] + rounds * self.weights[source]
            done[source] += 1
            release[source], deadline[source] = self._window(source, done[source])
        return SourceDraws(sources, numbers)

    def counts(self, position: int) -> tuple[int, ...]:
        """How many of the draws before `position` come from each source."""
        rounds, offset = divmod(position, self.period)
        state = self._state_at(offset)
        return tuple(rounds * w + count for w, count in zip(self.weights, state, strict=True))

    def _window(self, source: int, done: int) -> tuple[int, int]:
        """The release and the deadline of a source's next draw, after `done` draws of this period."""
        weight = self.weights[source]
        return done * self.period // weight, -(-(done + 1) * self.period // weight)

    def _windows(self, done: Sequence[int]) -> tuple[list[int], list[int]]:
        windows = [self._window(source, count) for source, count in enumerate(done)]
        return [release for release, _ in windows], [deadline for _, deadline in windows]

    def _state_at(self, offset: int) -> list[int]:
        """The draws of each source before `offset` positions of a period."""
        done = [offset * weight // self.period for weight in self.weights]
        extra = offset - sum(done)
        if extra == 0:
            return done
        # Draws in progress are released before `offset` and due after it: one per source at most, and
        # `extra` of them are done. Of the i that are due first, extra + lowest[i] are done, where
        #     lowest[i] = min over t <= offset of (pending(t) - those due after the i, released before t)
        #     pending(t) = the draws of all sources released before t, less t
        # and the minimum is 0 at t = 0. Between two releases only pending(t) varies, and it is at least 1:
        # a stretch that cannot lower anything is not scanned.
        release, deadline = self._windows(done)
        current = sorted((s for s in range(len(done)) if release[s] < offset), key=lambda s: (deadline[s], s))
        lowest = [0] * (len(current) + 1)
        end = offset
        for begin in sorted({release[s] for s in current}, reverse=True):
            later = [sum(release[s] <= begin for s in current[i:]) for i in range(len(lowest))]
            useful = max(low + count for low, count in zip(lowest, later, strict=True))
            pending = self._least_pending(begin + 1, end + 1, useful)
            lowest = [min(low, pending - count) for low, count in zip(lowest, later, strict=True)]
            end = begin
        for source, (before, after) in zip(current, itertools.pairwise(lowest), strict=True):
            done[source] += after - before
        return done

    def _least_pending(self, begin: int, end: int, least: int) -> int:
        """The minimum of `least` and of pending(t) over begin <= t < end (see `_state_at`)."""
        weights = np.array(self.weights)
        length = _FIRST_SCAN
        while end > begin and least > 1:
            t = np.arange(max(begin, end - length), end)
            released = -(-t[:, None] * weights // self.period)
            least = min(least, int((released.sum(axis=1) - t).min()))
            end -= length
            length = min(2 * length, _LONGEST_SCAN)
        return least


class Stream:
    """The endless stream of training samples: several sources, mixed, each shuffled in its own epochs."""

    def __init__(self, orders: Sequence[Order], schedule: Schedule) -> None:
        self._orders = orders
        self._schedule = schedule
        self.num_samples = sum(order.num_samples for order in orders)

    def samples(self, positions: np.ndarray) -> Samples:
        """The samples at these positions, which should be few runs of consecutive ones."""
        runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        draws = [self._schedule.draws(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        sources = np.concatenate([run.sources for run in draws])
        numbers = np.concatenate([run.numbers for run in draws])
        epochs, rows = np.empty((2, len(positions)), dtype=np.int64)
        for source, order in enumerate(self._orders):
            mine = np.flatnonzero(sources == source)
            epochs[mine], offsets = np.divmod(numbers[mine], order.num_samples)
            for epoch in np.unique(epochs[mine]):
                at = epochs[mine] == epoch
                rows[mine[at]] = order.sample_at(int(epoch), offsets[at])
        return Samples(sources, epochs, rows)

    def upcoming(self, position: int) -> list[tuple[int, int]]:
        """The source and number of each shard in the windows after those that the position is in."""
        counts = self._schedule.counts(position)
        return [
            (source, shard)
            for source, (order, count) in enumerate(zip(self._orders, counts, strict=True))
            for shard in order.upcoming(*divmod(count, order.num_samples))
        ]


class Concatenation:
    """The samples of several sources in their stored order, one source after the other, once."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._starts = self._ends - np.asarray(lengths)
        self.num_samples = int(self._ends[-1])

    def samples(self, positions: np.ndarray) -> Samples:
        """The samples at these positions, each in [0, num_samples)."""
        sources = np.searchsorted(self._ends, positions, side="right")
        return Samples(sources, np.zeros_like(positions), positions - self._starts[sources])
