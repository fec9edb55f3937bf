"""How far a training is: on rank 0's terminal a table that stays in its place, elsewhere a line at times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from mtl_dist.cell_table import CellTable
from mtl_dist.plural import readable
from mtl_dist.tracking.sink import Row, Sink
from mtl_dist.tracking.tracker import Tracker
from mtl_dist.training.plan import Plan

FIRST_GAP, LONGEST_GAP = 30.0, 600.0
"""Seconds between two lines where there is no terminal: the gap doubles from the first to the longest."""
_LOSSES_NAMED = 6


class ProgressSink(Sink):
    """Shows the newest step's row. `show` replaces the table of a terminal; without it `say` gets lines."""

    def __init__(
        self,
        plan: Plan,
        say: Callable[[str], None],
        show: Callable[[Group], None] | None = None,
        memory: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._say = say
        self._show = show
        self._memory = memory
        self._clock = clock
        self._gap = FIRST_GAP
        self._next = clock()

    def row(self, row: Row) -> None:
        if row.kind != "step":
            return
        if self._show is not None:
            self._show(self.table(row))
        elif self._clock() >= self._next and row.step < self._plan.total_steps:
            self._say(self.line(row))
            self._next = self._clock() + self._gap
            self._gap = min(2 * self._gap, LONGEST_GAP)

    def line(self, row: Row) -> str:
        """Where it is, in one line."""
        losses = losses_of(row)
        each = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
        named = f" ({each})" if len(losses) > 1 else ""
        parts = [self._where(row), f"loss {row.metrics.get('step/loss', float('nan')):.4g}{named}"]
        return "  ".join([*parts, *self._machine(row)])

    def table(self, row: Row) -> Group:
        """The same as a bar and a table, a row for each task."""
        done = min(row.step * self._plan.global_batch, self._plan.end_position)
        bar = ProgressBar(total=self._plan.end_position, completed=done, width=40)
        losses = CellTable(box=None, pad_edge=False, show_header=False)
        losses.add_row("loss", readable(row.metrics.get("step/loss", math.nan)))
        for name, value in losses_of(row, most=1000).items():
            losses.add_row(f"  {name}", readable(value))
        head = CellTable(box=None, pad_edge=False, show_header=False)
        head.add_row(self._where(row), bar)  # alone the bar would not end its line
        return Group(head, losses, Text("  ".join(self._machine(row))))

    def _where(self, row: Row) -> str:
        position = min(row.step * self._plan.global_batch, self._plan.end_position)
        epoch = -(-position // self._plan.samples_per_epoch)  # that of the step's last sample
        return f"epoch {epoch}/{self._epochs}  step {row.step}/{self._plan.total_steps}"

    @property
    def _epochs(self) -> int:
        return -(-self._plan.end_position // self._plan.samples_per_epoch)

    def _machine(self, row: Row) -> list[str]:
        speed = row.metrics.get("images_per_s", 0.0)
        parts = [f"{speed:,.3g} images/s" if speed < 1000 else f"{speed:,.0f} images/s"]
        position = row.step * self._plan.global_batch
        if speed > 0:
            left = max(0, self._plan.end_position - position) / speed
            parts.append(f"{time_left(left)} left, evaluations apart")
        parts.append(f"data wait {row.metrics.get('data_wait', 0.0):.0%}")
        memory = self._memory()
        return parts + ([f"memory {memory / 2**30:.1f} GiB"] if memory else [])


def losses_of(row: Row, most: int = _LOSSES_NAMED) -> Mapping[str, float]:
    """The tasks' losses of a step; none where there are too many for a line."""
    found = {
        name.split("/")[1]: value
        for name, value in row.metrics.items()
        if name.startswith("step/") and name.endswith("/loss") and name.count("/") == 2
    }
    return found if len(found) <= most else {}


def time_left(seconds: float) -> str:
    """A time in whole minutes, or seconds where it is short.

    >>> time_left(42.4), time_left(150), time_left(7260)
    ('42 s', '2 min', '2 h 1 min')
    """
    minutes = int(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def showing(tracker: Tracker, plan: Plan, memory: Callable[[], int]) -> Iterator[None]:
    """Show the progress of rank 0 while the block trains."""
    if tracker.directory is None:
        yield
        return
    if not tracker.console.is_terminal:
        tracker.attach("progress", ProgressSink(plan, tracker.say, memory=memory))
        yield
        return
    with Live(console=tracker.console, transient=True, refresh_per_second=4) as live:
        tracker.attach("progress", ProgressSink(plan, tracker.say, live.update, memory))
        try:
            yield
        finally:
            tracker.detach("progress")
