"""Concurrent askers share a batch; none waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from mtl_dist.serving.batching import Batcher, QueueFull


class Held:
    """Doubles numbers; the first batch is held until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        self.begun.set()
        self.go.wait(10)
        if -1 in numbers:
            raise ValueError("no")
        return [2 * number for number in numbers]


def test_what_comes_while_a_batch_is_answered_is_the_next_batch() -> None:
    held = Held()
    batcher = Batcher(held, max_batch=3, max_queue=8)
    first = batcher.submit(1)
    held.begun.wait(10)
    others = [batcher.submit(number) for number in range(2, 7)]
    held.go.set()
    assert first.result(10) == 2
    assert [future.result(10) for future in others] == [4, 6, 8, 10, 12]
    assert held.batches == [[1], [2, 3, 4], [5, 6]]
    assert (batcher.num_batches, batcher.num_answered, batcher.num_waiting) == (3, 6, 0)
    batcher.close()


def test_a_full_queue_refuses_one_that_is_cancelled_is_passed_over_and_an_error_ends_nothing() -> None:
    held = Held()
    batcher = Batcher(held, max_batch=1, max_queue=2)
    failing = batcher.submit(-1)
    held.begun.wait(10)
    given_up, kept = batcher.submit(5), batcher.submit(6)
    with pytest.raises(QueueFull):
        batcher.submit(7)
    given_up.cancel()
    held.go.set()
    with pytest.raises(ValueError, match="no"):
        failing.result(10)
    assert kept.result(10) == 12
    assert held.batches == [[-1], [6]]
    batcher.close()
