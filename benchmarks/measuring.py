"""Time and memory: how contenders are measured beside one another.

Contenders take turns in one process (or one group of ranks), so that a change in the machine's speed meets
all alike, and their ratio is the median over the turns, not a ratio of medians. On a CPU the time is the
processor's, because the clock's swings with what else the machine does; on a GPU it is the clock's, once the
GPU has done all. Memory on a GPU is the allocator's; on a CPU it is what is resident, for which glibc has to
give every freed block back at once (`MEMORY_ENVIRONMENT`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

Advance = Callable[[int], None]
"""Called after every step with its number of samples, as `Trainer.run` does it."""
Steps = Callable[[int, Advance], None]
"""So many steps of one contender, which goes on where it ended before."""

MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Of a process whose memory is measured on a CPU."""


def clock(device: torch.device) -> float:
    """Seconds; on a GPU once it has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def effort(device: torch.device) -> float:
    """Seconds of this process's processor; on a GPU those of the clock, once it has done all."""
    return clock(device) if device.type == "cuda" else time.process_time()


class Laps:
    """The clock of `steps + 1` steps, called after each.

    The first step does not count: it begins before the loop does.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device = device
        self._steps = steps
        self._count = 0
        self._start = self._end = 0.0

    def __call__(self, samples: int) -> None:
        if self._count == 0:
            self._start = effort(self._device)
        elif self._count == self._steps:
            self._end = effort(self._device)
        self._count += 1

    @property
    def seconds_per_step(self) -> float:
        return (self._end - self._start) / self._steps


def in_turns(
    contenders: Mapping[str, Steps], steps: Mapping[str, int], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per step of each contender, one for each turn of `steps[name]` steps."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        # Every second time in reverse: whoever follows another finds its caches.
        for name in list(contenders) if number % 2 else reversed(list(contenders)):
            laps = Laps(device, steps[name])
            contenders[name](steps[name] + 1, laps)
            if number:  # the first turn warms up
                seconds[name].append(laps.seconds_per_step)
    return seconds


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """What each turn took in parts of the reference's same turn."""
    return [own / other for own, other in zip(seconds, reference, strict=True)]


def median_speed(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """The speed relative to the reference's."""
    return statistics.median(ratios(reference, seconds))


class Gauge:
    """The most memory in use since it was made, beyond what was in use then.

    Called after every step, it notes the peak so far: what follows the last step is not in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.noted = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
            self._before = _resident("VmRSS")

    def __call__(self, samples: int) -> None:
        self.noted = self.peak()

    def peak(self) -> int:
        """Bytes, now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _resident("VmHWM") - self._before


def memory_is_measured() -> bool:
    """Whether this machine lets a process see its peak: a GPU, or Linux with its /proc."""
    return torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def first(batches: Iterable[T], number: int) -> Iterator[T]:
    """So many batches, and no more fetched than these."""
    source = iter(batches)
    for _ in range(number):
        yield next(source)
