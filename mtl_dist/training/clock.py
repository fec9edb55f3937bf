"""Where the time of a training goes: into steps, or into waiting for data."""

from __future__ import annotations

import time


class StepClock:
    """The time since the last logged step; evaluations and saves do not count."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._waited = self._worked = 0.0
        self._steps = 0

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        return lap

    def waited(self) -> None:
        """The time since the last call was spent waiting for data."""
        self._waited += self._lap()

    def worked(self) -> None:
        """The time since the last call was spent on an optimizer step."""
        self._worked += self._lap()
        self._steps += 1

    def skip(self) -> None:
        """The time since the last call does not count."""
        self._lap()

    def metrics(self, global_batch: int) -> dict[str, float]:
        """Images per second over all ranks, and the fraction of the time spent waiting for data."""
        seconds = max(self._waited + self._worked, 1e-9)
        metrics = {"images_per_s": self._steps * global_batch / seconds, "data_wait": self._waited / seconds}
        self._waited = self._worked = 0.0
        self._steps = 0
        return metrics
