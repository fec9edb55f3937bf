"""Several sources in one stream: fair over every prefix, found at any position, each in its own epochs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtl_dist.data.mixing import Concatenation, Schedule, Stream, integer_weights
from mtl_dist.data.order import Order
from mtl_dist.data.settings import (
    EqualMixing,
    ProportionalMixing,
    SourceSettings,
    TemperatureMixing,
    WeightedMixing,
)
from mtl_dist.errors import UserError

small_weights = st.lists(st.integers(1, 60), min_size=1, max_size=9)
uneven_weights = st.lists(st.floats(0, 3.3).map(lambda exponent: int(10**exponent)), min_size=2, max_size=9)


def prefix_counts(schedule: Schedule, stop: int) -> np.ndarray:
    """Draws of each source before position 0, 1, ..., stop."""
    counts = np.zeros((stop + 1, len(schedule.weights)), dtype=np.int64)
    counts[np.arange(1, stop + 1), schedule.draws(0, stop).sources] = 1
    return counts.cumsum(axis=0)


@given(st.one_of(small_weights, uneven_weights))
@example([1, 1, 1, 1, 1, 1, 1, 1, 1])
@example([9000, 1, 2, 3, 1, 1, 1])
@example([40, 20, 10, 5, 2, 1])
@settings(max_examples=60, deadline=None)
def test_over_any_prefix_every_source_is_less_than_one_draw_from_its_share(weights: list[int]) -> None:
    schedule = Schedule(weights)
    stop = min(2 * schedule.period + 3, 1500)
    counts = prefix_counts(schedule, stop)
    wanted = np.outer(np.arange(stop + 1), weights) / sum(weights)
    assert np.abs(counts - wanted).max() < 1


@given(st.one_of(small_weights, uneven_weights), st.data())
@settings(max_examples=60, deadline=None)
def test_a_schedule_begun_anywhere_goes_on_as_if_begun_at_the_start(
    weights: list[int], data: st.DataObject
) -> None:
    schedule = Schedule(weights)
    stop = min(2 * schedule.period + 3, 1500)
    whole = schedule.draws(0, stop)
    counts = prefix_counts(schedule, stop)
    for _ in range(5):
        begin = data.draw(st.integers(0, stop))
        assert schedule.counts(begin) == tuple(counts[begin])
        part = schedule.draws(begin, min(stop, begin + 25))
        assert np.array_equal(part.sources, whole.sources[begin : begin + 25])
        assert np.array_equal(part.numbers, whole.numbers[begin : begin + 25])


def test_the_draws_of_a_source_are_numbered_without_gaps() -> None:
    draws = Schedule([5, 3, 1]).draws(0, 200)
    for source in range(3):
        numbers = draws.numbers[draws.sources == source]
        assert np.array_equal(numbers, np.arange(len(numbers)))


@pytest.mark.parametrize("position", [123_456_789, 99_999_999_999])
def test_the_share_is_kept_deep_inside_a_stream_of_a_hundred_million_samples(position: int) -> None:
    lengths = [70_000_003, 29_000_000, 900_001, 99_996, 17]
    counts = Schedule(lengths).counts(position)
    assert sum(counts) == position
    for count, length in zip(counts, lengths, strict=True):
        assert abs(count * sum(lengths) - position * length) < sum(lengths)


def test_real_weights_become_integers_of_the_same_shares_and_none_vanishes() -> None:
    weights = integer_weights([0.7, 0.3, 1e-12])
    assert np.allclose(np.array(weights) / sum(weights), [0.7, 0.3, 0], atol=2e-9)
    assert min(weights) == 1


def test_too_many_samples_for_exact_mixing_are_refused() -> None:
    with pytest.raises(UserError, match="at most 3,000,000,000 samples"):
        Schedule([2**31, 2**31 + 1])


def sources(*weights: float | None) -> list[SourceSettings]:
    return [
        SourceSettings.model_validate({"path": "x", "weight": weight}, strict=False) for weight in weights
    ]


def test_the_kinds_of_mixing_give_the_shares_they_promise() -> None:
    def shares(weights: object) -> list[float]:
        values = np.array(weights, dtype=float)
        return list(values / values.sum())

    two = sources(None, None)
    assert shares(ProportionalMixing().weights(two, [900, 100])) == [0.9, 0.1]
    assert shares(EqualMixing().weights(two, [900, 100])) == [0.5, 0.5]
    assert shares(TemperatureMixing(temperature=2).weights(two, [900, 100])) == pytest.approx([0.75, 0.25])
    assert shares(TemperatureMixing(temperature=1).weights(two, [900, 100])) == pytest.approx([0.9, 0.1])
    assert shares(WeightedMixing().weights(sources(1.0, 4.0), [900, 100])) == pytest.approx([0.2, 0.8])


def stream_of(lengths: list[int], weights: list[int]) -> Stream:
    orders = [Order([length], 8, key) for key, length in enumerate(lengths)]
    return Stream(orders, Schedule(weights))


def seen(stream: Stream, start: int, stop: int) -> list[tuple[int, int, int]]:
    return list(stream.samples(np.arange(start, stop)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_mixed_in_proportion_every_epoch_holds_every_sample_of_every_source_once(lengths: list[int]) -> None:
    stream = stream_of(lengths, lengths)
    everything = [(source, row) for source, length in enumerate(lengths) for row in range(length)]
    for epoch in range(3):
        samples = seen(stream, epoch * sum(lengths), (epoch + 1) * sum(lengths))
        assert {own for _, own, _ in samples} == {epoch}
        assert sorted((source, row) for source, _, row in samples) == everything


def test_with_other_weights_each_source_runs_through_its_own_epochs() -> None:
    lengths, weights = [30, 7], [1, 2]
    samples = seen(stream_of(lengths, weights), 0, 90)
    for source, length in enumerate(lengths):
        mine = [(epoch, row) for s, epoch, row in samples if s == source]
        for epoch in range(len(mine) // length):
            rows = sorted(row for _, row in mine[epoch * length : (epoch + 1) * length])
            assert rows == list(range(length))
            assert {e for e, _ in mine[epoch * length : (epoch + 1) * length]} == {epoch}
    assert Counter(source for source, _, _ in samples) == {0: 30, 1: 60}


@given(st.integers(0, 400), st.integers(0, 60), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_a_stream_is_the_same_in_whatever_pieces_it_is_read(start: int, length: int, piece: int) -> None:
    stream = stream_of([30, 17, 5], [3, 2, 2])
    pieces = [
        sample
        for begin in range(start, start + length, piece)
        for sample in seen(stream, begin, min(begin + piece, start + length))
    ]
    assert pieces == (seen(stream, start, start + length) if length else [])


def test_positions_in_several_runs_are_looked_up_like_each_run() -> None:
    stream = stream_of([30, 17, 5], [3, 2, 2])
    positions = np.array([5, 6, 7, 0, 1, 90, 91, 5])
    assert list(stream.samples(positions)) == [seen(stream, int(p), int(p) + 1)[0] for p in positions]


def test_a_concatenation_shows_the_sources_one_after_the_other() -> None:
    samples = Concatenation([2, 3]).samples(np.arange(5))
    assert list(samples) == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 0, 2)]
