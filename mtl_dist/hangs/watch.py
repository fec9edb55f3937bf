"""A run that hangs ends, and says where it hung: a watch in every rank over its own main thread.

    main thread      beats (heartbeat.py) at every phase of a step, an evaluation, a save
    watch thread     sees that the beats stop, and ends this process: nothing of a hung main thread is needed
    share thread     tells the other ranks how far this one is, and hears their alarm (ranks.py)

The ranks of a run wait for one another, so when one hangs all do. Whoever is silent, or else is behind, is
the one that hung. When one ends by an error none gets further: it tells so, and those whose collectives do
not break by themselves end as well. Nothing is added to a step: the threads look every second.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.hangs.ranks import Failure, Pulse, Ranks, culprits, own_pulse, reason_of_hang, silent_ranks
from mtl_dist.heartbeat import Beat, beat, last_beat
from mtl_dist.printable import say
from mtl_dist.status import Status, read_status, write_status
from mtl_dist.stopping import StopSignal

SLOW = 6
"""How many times the timeout the start and a save may take, and everything while parts are compiled."""

STOP_PATIENCE_S = 60.0
"""How long a run that was asked to stop may go without progress."""

ABORT_PATIENCE_S = 10.0
"""How long the main thread may take to end after a second Ctrl-C."""

_TELL_S = 10.0
"""What printing and writing down may take: the terminal or the disk may be what hangs."""

_TICK_S = 1.0

_LOST_AFTER = 4
"""Ticks of silence after which a rank is held for dead, once an error has shown that something is wrong."""

_LEAVE_AFTER, _SAY_WITHIN = 6, 20
"""Ticks in which a rank's main thread must meet the error by itself once another has ended by one; and in
which it must be gone once it has, with the cause found and written down."""


class HangWatch:
    """Watches over the main thread of this rank while the block runs.

    `timeout_s` is the longest time between two beats (None: no bound); where `compiling`, all may take as
    long as a save. `directory` is the run folder, once it is known.
    """

    def __init__(
        self, world: World, timeout_s: float | None, stop: StopSignal, *, compiling: bool = False
    ) -> None:
        self.directory: Path | None = None
        self._world = world
        self._timeout_s = timeout_s
        self._stop = stop
        self._compiling = compiling
        self._tick_s = _TICK_S if timeout_s is None else min(_TICK_S, timeout_s / 8)
        self._main = threading.get_ident()
        # A line for each thread, made while there is somebody to connect to: a new one to a store that is
        # gone is tried for minutes, on one that was there an error comes at once.
        self._ranks = Ranks.of_group(world.rank, world.size) if world.size > 1 else None
        self._main_line = self._ranks.clone() if self._ranks is not None else None
        self._watch_line = self._ranks.clone() if self._ranks is not None else None
        self._over = threading.Event()
        self._alarm = threading.Event()
        self._gathered = threading.Event()
        self._end_code: int | None = None
        self._failing = False
        self._pulses: dict[int, Pulse] = {}
        self._silent: set[int] = set()
        self._reports = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> HangWatch:
        beat("the start", 0, slow=True)
        if self._ranks is not None:
            self._run(self._share)
        self._run(self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._report_end(error)
            if self._ranks is not None:
                gc.freeze()  # nothing is left to collect for: a process with torch in it would for seconds
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._tick_s)

    def _run(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"hangs{target.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    # ------------------------------------------------------------------ the watch over the main thread
    def _watch(self) -> None:
        seen, stuck_s, aborting_s, ending_s = last_beat(), 0.0, 0.0, 0.0
        before = time.monotonic()
        while not self._over.wait(self._tick_s):
            now = time.monotonic()
            # A process that was suspended as a whole does not hang: time counts while this thread runs.
            lap, before = min(now - before, 2 * self._tick_s), now
            latest = last_beat()
            seen, stuck_s = latest, stuck_s + lap if latest is seen else 0.0
            if self._stop.aborting:
                aborting_s += lap
                if aborting_s > ABORT_PATIENCE_S:
                    os._exit(128 + signal.SIGINT)
            if self._end_code is not None:
                ending_s += lap
                if ending_s > self._tick_s * (_SAY_WITHIN if self._failing else _LEAVE_AFTER):
                    self.follow(self._end_code)
            limit_s = self._limit_s(latest)
            if limit_s is not None and stuck_s > limit_s:
                self._alarm.set()
            if self._alarm.is_set():
                self._end(limit_s or stuck_s)
            self._arm_faulthandler(limit_s)
        if self._timeout_s is not None:
            faulthandler.cancel_dump_traceback_later()

    def _limit_s(self, latest: Beat) -> float | None:
        if self._timeout_s is None:
            return None
        slow = latest.slow or self._compiling
        if self._stop.heard:
            return self._timeout_s if slow else min(self._timeout_s, STOP_PATIENCE_S)
        return self._timeout_s * SLOW if slow else self._timeout_s

    def _arm_faulthandler(self, limit_s: float | None) -> None:
        """Where C code keeps all Python from running, also this thread, stacks are printed all the same."""
        if limit_s is not None and sys.__stderr__ is not None:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback_later(limit_s + 4 * self._tick_s, file=sys.__stderr__)

    # ------------------------------------------------------------------ the other ranks
    def _share(self) -> None:
        """Tell the others how far this rank is, hear of their end; after an alarm gather what they report."""
        ranks = self._ranks
        assert ranks is not None
        try:
            while not self._alarm.is_set():
                self._report(ranks, stack=False)
                if self._end_code is None:
                    self._end_code = ranks.hear_end()
                if ranks.hear_alarm():
                    self._alarm.set()
                elif self._over.wait(self._tick_s):
                    return
            ranks.raise_alarm()
            before = ranks.pulses()
            for _ in range(4):
                self._report(ranks, stack=True)
                time.sleep(self._tick_s)
            self._pulses = ranks.pulses()
            self._silent = silent_ranks(before, self._pulses) - {self._world.rank}
        except RuntimeError:  # who holds the store has ended, and with it the run
            self._end_code = self._end_code or 1
        self._gathered.set()

    def _report(self, ranks: Ranks, *, stack: bool) -> None:
        self._reports += 1
        ranks.report(own_pulse(self._reports, self._main, stack=stack))

    # ------------------------------------------------------------------ the end
    def _end(self, limit_s: float) -> None:
        """Say who hung, and end this process; whatever may hang as well has a bound."""
        if self._ranks is not None:
            self._gathered.wait(6 * self._tick_s + _TELL_S)
        rank = self._world.rank
        pulses = {rank: own_pulse(self._reports, self._main, stack=True)} | self._pulses
        reason = reason_of_hang(pulses, self._silent, in_words(limit_s))
        speaks = rank == min(pulses.keys() - self._silent)

        def last_words() -> None:
            if speaks:
                for guilty in culprits(pulses, self._silent):
                    if pulses[guilty].stack:
                        say(f"{pulses[guilty].name(guilty)}:\n{pulses[guilty].stack}", sys.stderr)
                say(reason, sys.stderr)
            if self.directory is not None and self.directory.is_dir():
                write_down(self.directory, rank, reason if speaks else "")

        within(_TELL_S, last_words)
        if not speaks:
            time.sleep(_TELL_S / 2)  # the launcher ends all ranks as soon as one has ended
        self._leave(1)

    def follow(self, code: int) -> None:
        """End as another rank has: nothing tells the main thread, which waits for it."""

        def last_words() -> None:
            failure = self._watch_line.hear_failure() if self._watch_line is not None else None
            if failure is not None and self._world.is_main and self.directory is not None:
                write_failure(self.directory, failure)

        within(_TELL_S / 2, last_words)
        self._leave(code)

    def _leave(self, code: int) -> NoReturn:
        for child in multiprocessing.active_children():
            child.kill()  # data workers: one that is stopped would stay
        os._exit(code)

    # ------------------------------------------------------------------ failures
    def first_cause(self, error: BaseException) -> Failure:
        """Why the run fails: the error of the rank that failed first, where `error` is but its echo.

        Called by every rank that fails, before it ends: the others feel it only afterwards.
        """
        own = Failure(self._world.rank, last_line(error), isinstance(error, UserError))
        self._report_end(error)
        if self._stop.aborting:
            return replace(own, reason="a second Ctrl-C, which ends it at once", mistake=False)
        ranks = self._main_line
        if ranks is None or isinstance(error, KeyboardInterrupt):
            return own
        with suppress(RuntimeError):
            if isinstance(error, RuntimeError) and not ranks.hear_failure():
                own = ranks.lost_rank(_LOST_AFTER * self._tick_s) or own
            return ranks.first_failure(own)
        return own

    def _report_end(self, error: BaseException) -> None:
        self._failing = True
        if self._main_line is not None:
            with suppress(RuntimeError):
                self._main_line.report_end(2 if isinstance(error, UserError) else 1)


def within(seconds: float, function: Callable[[], None]) -> None:
    """Calls `function`, and does not wait longer for it."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)


def write_failure(directory: Path, failure: Failure) -> None:
    status = read_status(directory) or Status("failed")
    failed = replace(status, state="failed", reason=failure.reason, retry=not failure.mistake)
    write_status(directory, replace(failed, updated=time.time()))


def write_down(directory: Path, rank: int, reason: str) -> None:
    """The stacks of this rank; and why the run ended, in its status and log, where this one speaks."""
    if reason:
        write_failure(directory, Failure(rank, reason))
        with open(directory / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{reason}\n")
    stacks = directory / "hang"
    stacks.mkdir(exist_ok=True)
    with open(stacks / f"rank_{rank}.txt", "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def in_words(seconds: float) -> str:
    """
    >>> in_words(300.0), in_words(2.5)
    ('5 min', '2.5 s')
    """
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def last_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
