"""A run that hangs ends, and says where it hung: a watch in every rank over its own main thread.

    main thread      beats (heartbeat.py) at every phase of a step, an evaluation, a save
    watch thread     sees that the beats stop, and ends this process: nothing of a hung main thread is needed
    share thread     tells the other ranks how far this one is, and hears their alarm (ranks.py)

The ranks of a run wait for one another, so when one hangs all do. Whoever is silent, or else is behind, is
the one that hung. Nothing is added to a step: the threads look every other second.
"""

from __future__ import annotations

import faulthandler
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

from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.hangs.ranks import Failure, Pulse, Ranks, culprits, own_pulse, reason_of_hang, silent_ranks
from mtl_dist.heartbeat import Beat, beat, last_beat
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

_TICK_S = 2.0


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
        self._ranks = Ranks.of_group(world.rank, world.size) if world.size > 1 else None
        self._over = threading.Event()
        self._alarm = threading.Event()
        self._gathered = threading.Event()
        self._pulses: dict[int, Pulse] = {}
        self._silent: set[int] = set()
        self._told = 0
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
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._tick_s)

    def _run(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"hangs{target.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    # ------------------------------------------------------------------ the watch over the main thread
    def _watch(self) -> None:
        turn, stuck_s, aborting_s = -1, 0.0, 0.0
        before = time.monotonic()
        while not self._over.wait(self._tick_s):
            now = time.monotonic()
            # A process that was suspended as a whole does not hang: time counts while this thread runs.
            lap, before = min(now - before, 2 * self._tick_s), now
            latest = last_beat()
            turn, stuck_s = latest.turn, stuck_s + lap if latest.turn == turn else 0.0
            if self._stop.aborting:
                aborting_s += lap
                if aborting_s > ABORT_PATIENCE_S:
                    os._exit(128 + signal.SIGINT)
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
        """Tell the others how far this rank is; after an alarm gather what they have told."""
        ranks = self._ranks
        assert ranks is not None
        with suppress(RuntimeError):  # who holds the store has ended
            while not self._alarm.is_set():
                self._tell(ranks, stack=False)
                if ranks.hear_alarm():
                    self._alarm.set()
                elif self._over.wait(self._tick_s):
                    return
            ranks.raise_alarm()
            before = ranks.pulses()
            for _ in range(4):
                self._tell(ranks, stack=True)
                time.sleep(self._tick_s)
            self._pulses = ranks.pulses()
            self._silent = silent_ranks(before, self._pulses) - {self._world.rank}
        self._gathered.set()

    def _tell(self, ranks: Ranks, *, stack: bool) -> None:
        self._told += 1
        ranks.tell(own_pulse(self._told, self._main, stack=stack))

    # ------------------------------------------------------------------ the end
    def _end(self, limit_s: float) -> None:
        """Say who hung, and end this process; whatever may hang as well has a bound."""
        if self._ranks is not None:
            self._gathered.wait(6 * self._tick_s + _TELL_S)
        rank = self._world.rank
        pulses = {rank: own_pulse(self._told, self._main, stack=True)} | self._pulses
        reason = reason_of_hang(pulses, self._silent, in_words(limit_s))
        speaks = rank == min(pulses.keys() - self._silent)

        def last_words() -> None:
            if speaks:
                for guilty in culprits(pulses, self._silent):
                    if pulses[guilty].stack:
                        print(f"{pulses[guilty].name(guilty)}:\n{pulses[guilty].stack}", file=sys.stderr)
                print(reason, file=sys.stderr, flush=True)
            if self.directory is not None and self.directory.is_dir():
                write_down(self.directory, rank, reason if speaks else "")

        teller = threading.Thread(target=last_words, daemon=True)
        teller.start()
        teller.join(_TELL_S)
        for child in multiprocessing.active_children():
            child.kill()  # data workers: one that is stopped would stay
        if not speaks:
            time.sleep(_TELL_S / 2)  # the launcher ends all ranks as soon as one has ended
        os._exit(1)

    # ------------------------------------------------------------------ failures
    def first_cause(self, error: BaseException) -> Failure:
        """Why the run fails: the error of the rank that failed first, where `error` is but its echo.

        Called by every rank that fails, before it ends: the others feel it only afterwards.
        """
        own = Failure(self._world.rank, last_line(error), isinstance(error, UserError))
        if self._ranks is None or isinstance(error, KeyboardInterrupt):
            return own
        with suppress(RuntimeError):
            ranks = self._ranks.clone()
            if isinstance(error, RuntimeError) and not ranks.hear_failure():
                own = ranks.lost_rank(4 * self._tick_s) or own
            return ranks.first_failure(own)
        return own


def write_down(directory: Path, rank: int, reason: str) -> None:
    """The stacks of this rank; and why the run ended, in its status and log, where this one speaks."""
    if reason:
        status = read_status(directory) or Status("failed")
        write_status(directory, replace(status, state="failed", reason=reason, updated=time.time()))
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
