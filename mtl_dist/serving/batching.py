"""Images of concurrent requests, answered together: one thread runs the model, who asks has a future.

What comes while the model runs makes the next batch; the first image waits for no others. To let it wait 2 ms
gave no more images per second under load, and took a quarter of them from a single client
(`python -m benchmarks serve`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class QueueFull(Exception):
    """More wait already than may."""


@dataclass(frozen=True)
class _Waiting(Generic[A, B]):
    one: A
    future: Future[B] = field(default_factory=Future)


class Batcher(Generic[A, B]):
    """Hands what is submitted to `answer`, up to `max_batch` at once, in the order in which it came."""

    def __init__(self, answer: Callable[[Sequence[A]], Sequence[B]], max_batch: int, max_queue: int) -> None:
        self._answer = answer
        self._max_batch = max_batch
        self._waiting: queue.Queue[_Waiting[A, B] | None] = queue.Queue(max_queue)
        self.num_batches = 0
        self.num_answered = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return self._waiting.qsize()

    def submit(self, one: A) -> Future[B]:
        """A future of its answer; one that is cancelled before its turn is passed over.

        Raises:
            QueueFull: as many wait as may.
        """
        waiting: _Waiting[A, B] = _Waiting(one)
        try:
            self._waiting.put_nowait(waiting)
        except queue.Full:
            raise QueueFull from None
        return waiting.future

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, ends = self._gathered(first)
            batch = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
            if batch:
                self._work(batch)
            if ends:
                return

    def _gathered(self, first: _Waiting[A, B]) -> tuple[list[_Waiting[A, B]], bool]:
        """The first and those that wait behind it; whether the end does too."""
        batch = [first]
        while len(batch) < self._max_batch:
            try:
                following = self._waiting.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return batch, True
            batch.append(following)
        return batch, False

    def _work(self, batch: list[_Waiting[A, B]]) -> None:
        try:
            answers = self._answer([waiting.one for waiting in batch])
            for waiting, answer in zip(batch, answers, strict=True):
                waiting.future.set_result(answer)
        except Exception as error:  # whoever waits is told; the thread goes on
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
        self.num_batches += 1
        self.num_answered += len(batch)
