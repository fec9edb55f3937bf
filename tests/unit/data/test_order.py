"""The order is a bijection that looks random, found at any position without a list."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.data.order import Order, ShuffleWindow
from mtl_dist.randomness import (
    Draws,
    derive_key,
    hash_array,
    hash_int,
    permute,
    rank_seed,
    shared_seed,
)

# Chi-square statistics are compared with mean + 6 deviations of their distribution: a good generator fails
# one such test in more than ten thousand, and the keys are fixed.


def chi_square_is_small(counts: np.ndarray) -> bool:
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return statistic < freedom + 6 * np.sqrt(2 * freedom)


def permutations(size: int, num_keys: int) -> np.ndarray:
    keys = hash_array(np.arange(num_keys, dtype=np.uint64) + np.uint64(1000 * size))
    indices = np.tile(np.arange(size), num_keys)
    images = permute(indices, np.full(indices.size, size), np.repeat(keys, size))
    return images.reshape(num_keys, size)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permuting_any_range_under_any_key_gives_every_number_once(size: int, key: int) -> None:
    images = permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert np.array_equal(np.sort(images), np.arange(size))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_permuting_stays_inside_a_range_of_any_size_and_never_merges(
    size: int, key: int, data: st.DataObject
) -> None:
    indices = np.array(
        data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)), dtype=np.int64
    )
    images = permute(indices, np.full(len(indices), size), np.full(len(indices), key, np.uint64))
    assert ((images >= 0) & (images < size)).all()
    assert len(np.unique(images)) == len(indices)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 10, 16, 23, 60])
def test_over_keys_every_index_goes_everywhere_equally_often(size: int) -> None:
    images = permutations(size, num_keys=max(2000, 100_000 // size))
    for index in range(min(size, 12)):
        assert chi_square_is_small(np.bincount(images[:, index], minlength=size))


@pytest.mark.parametrize("size", [3, 4, 5, 7, 8, 10, 16, 23])
def test_over_keys_pairs_of_indices_go_everywhere_equally_often(size: int) -> None:
    images = permutations(size, num_keys=max(4000, 200_000 // size))
    for a, b in ((0, 1), (size - 2, size - 1), (0, size - 1)):
        pairs = np.bincount(images[:, a] * size + images[:, b], minlength=size * size).reshape(size, size)
        assert np.trace(pairs) == 0
        assert chi_square_is_small(pairs[~np.eye(size, dtype=bool)])


def test_neighbours_stay_neighbours_no_more_often_than_by_chance() -> None:
    images = permutations(1000, num_keys=200)
    followers = int((np.diff(images, axis=1) == 1).sum())
    expected = 200 * 999 / 1000
    assert abs(followers - expected) < 6 * np.sqrt(expected)


def test_the_hash_is_the_same_for_integers_and_arrays() -> None:
    values = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert hash_array(values).tolist() == [hash_int(int(value)) for value in values]


def test_the_hash_never_changes_because_runs_resume_across_versions() -> None:
    # SplitMix64 started at 0 and at its own increment, from its author's reference code.
    assert hash_int(0) == 0xE220A8397B1DCDAF
    assert hash_int(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_the_seeds_of_what_torch_draws_never_change() -> None:
    ranks = [rank_seed(*key) for key in ((0, 0, 0), (0, 1, 0), (7, 1234, 3))]
    assert ranks == [0x42BB71A313EE0A0A, 0x261C6457B2E48DA9, 0x4C8FF72A6440532A]
    shared = [shared_seed(*key) for key in ((0, 0), (0, 1), (7, 1234))]
    assert shared == [0x0, 0x51B54A32D192ED03, 0x2F63FD08B143DD09]


def test_keys_of_different_parts_or_orders_differ() -> None:
    keys = {derive_key(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(keys) == 1000


def test_drawn_numbers_are_uniform_within_and_across_keys() -> None:
    draws = Draws(5)
    within = np.array([draws.uniform(2, 4) for _ in range(20_000)])
    across = np.array([Draws(derive_key(7, i)).uniform(2, 4) for i in range(20_000)])
    for numbers in (within, across):
        assert numbers.min() >= 2
        assert numbers.max() < 4
        assert chi_square_is_small(np.histogram(numbers, bins=50, range=(2, 4))[0])


SIZES = [7, 1, 20, 3, 9, 12, 1, 30, 4]
WINDOWS: list[ShuffleWindow] = [1, 2, 4, 9, 50, "off", "full"]


@pytest.mark.parametrize("window", WINDOWS)
def test_every_epoch_visits_every_row_once(window: ShuffleWindow) -> None:
    order = Order(SIZES, window, key=3)
    for epoch in range(4):
        rows = order.sample_at(epoch, np.arange(sum(SIZES)))
        assert np.array_equal(np.sort(rows), np.arange(sum(SIZES)))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.one_of(st.integers(1, 14), st.sampled_from(["off", "full"])),
    st.integers(0, 2**32),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_position_means_the_same_row_however_it_is_asked_for(
    sizes: list[int], window: ShuffleWindow, key: int, data: st.DataObject
) -> None:
    rows = Order(sizes, window, key).sample_at(2, np.arange(sum(sizes)))
    positions = np.array(data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=1, max_size=10)))
    other = Order(sizes, window, key)
    other.sample_at(0, positions)
    assert np.array_equal(other.sample_at(2, positions), rows[positions])


def test_the_stored_order_is_kept_with_the_window_off() -> None:
    assert Order(SIZES, "off", key=3).sample_at(5, np.array([4, 0, 80])).tolist() == [4, 0, 80]


@pytest.mark.parametrize("window", [1, 3, "full"])
def test_epochs_and_keys_give_other_orders(window: ShuffleWindow) -> None:
    positions = np.arange(sum(SIZES))
    orders = {
        tuple(Order(SIZES, window, key).sample_at(epoch, positions)) for key in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_a_window_holds_the_samples_of_its_shards_and_no_others() -> None:
    order = Order([10] * 12, 4, key=1)
    rows = order.sample_at(0, np.arange(120)).reshape(3, 40)
    for window in rows:
        assert len(np.unique(window // 10)) == 4


def test_a_batch_meets_all_the_shards_of_its_window() -> None:
    order = Order([1000] * 32, 8, key=1)
    for start in range(0, 32_000, 4000):
        rows = order.sample_at(0, np.arange(start, start + 64))
        assert len(np.unique(rows // 1000)) == 8


@pytest.mark.parametrize(("sizes", "window"), [([3, 5, 1, 3], "full"), ([3, 3, 3, 3], 2)])
def test_over_seeds_every_position_shows_every_row_equally_often(
    sizes: list[int], window: ShuffleWindow
) -> None:
    counts = np.zeros((12, 12))
    for key in range(1500):
        counts[np.arange(12), Order(sizes, window, derive_key(key)).sample_at(1, np.arange(12))] += 1
    assert all(chi_square_is_small(row) for row in counts)


def test_seeking_in_a_hundred_million_samples_needs_no_list_of_them() -> None:
    order = Order([1000] * 100_000, 8, key=1)
    tracemalloc.start()
    order.sample_at(3, np.arange(77_000_000, 77_000_064))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20
