"""Being asked to stop: by a signal, or by a time limit that draws near.

A cluster asks with a signal (SIGUSR2, SIGTERM), a person with Ctrl-C or by closing the terminal (SIGHUP). A
handler here only sets a flag: it may run at any moment, also early, twice, or in the middle of a save, and on
some ranks before others. The trainer looks at the flag at every step boundary, and all ranks agree there.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

# A rank on a cluster imports this before everything else, so that no signal finds it without a handler.
if TYPE_CHECKING:
    from mtl_dist.engine.world import World

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

TIME_LIMIT = "time limit"


class StopAsked(Exception):
    """Something long that can be begun again was broken off, because a rank was asked to stop."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StopSignal:
    """Whether this process has been asked to stop, and why; one per process.

    `deadline` is the moment (of `clock`) at which the process will be killed, and `margin_s` the seconds
    before it that one step and one save may need: from then on `requested` is true without any signal.
    """

    def __init__(
        self, deadline: float | None = None, margin_s: float = 60.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.deadline = deadline
        self.margin_s = margin_s
        self._clock = clock
        self._pid = os.getpid()
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._ear: tuple[socket.socket, socket.socket] | None = None
        self._previous_ear = -1
        self._heard: list[int] = []
        self._terminals: list[int] = []

    def install(self) -> None:
        """Takes over SIGUSR2, SIGTERM, SIGINT and SIGHUP in this process; in another thread than the main
        one, which alone hears signals, nothing happens. A SIGHUP that is ignored (nohup) stays so.

        Install after every other library has: submitit's own SIGUSR2 handler would requeue the job at
        once, before the ranks could save together, and it ignores SIGTERM.
        """
        self._pid = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)
        self._terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]
        if self._ear is None:
            self._ear = socket.socketpair()
            for end in self._ear:
                end.setblocking(False)
            self._previous_ear = signal.set_wakeup_fd(self._ear[1].fileno(), warn_on_full_buffer=False)

    def ignore_afterwards(self) -> None:
        """Makes `restore` leave the signals ignored, for a process that only has to end after training.

        A signal that comes twice, or late, would otherwise meet the handlers that were there before:
        submitit's requeues the job at once.
        """
        self._previous = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)

    def restore(self) -> None:
        """Puts back the handlers that `install` found, for a process that goes on after training."""
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()
        if self._ear is not None:
            signal.set_wakeup_fd(self._previous_ear, warn_on_full_buffer=False)
            for end in self._ear:
                end.close()
            self._ear = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked data worker inherits this handler, and Slurm signals every process of a step: only the
        # process that installed it answers.
        if os.getpid() != self._pid:
            return
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            self._leave_terminals()
        if self._signal is None or number == signal.SIGINT:
            self._signal = signal.Signals(number)

    def _leave_terminals(self) -> None:
        """A terminal that was closed answers every line with an error, which would end the run."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        self._terminals = []

    @property
    def heard(self) -> bool:
        """True from the first signal on, also while the main thread is in a call that does not return and so
        cannot handle any; for another thread.
        """
        self._listen()
        return self.requested or any(number in STOP_SIGNALS for number in self._heard)

    @property
    def aborting(self) -> bool:
        """Whether SIGINT came twice; for another thread."""
        self._listen()
        return self._heard.count(signal.SIGINT) > 1

    def _listen(self) -> None:
        ear = self._ear
        if ear is not None:
            # BlockingIOError: nothing came; another OSError: the ear was closed meanwhile.
            with suppress(OSError):
                self._heard += ear[0].recv(64)

    @property
    def requested(self) -> bool:
        """True from the first signal on, or once the deadline is less than the margin away."""
        return self._signal is not None or self._near_deadline

    @property
    def reason(self) -> str:
        """Why the stop was requested (`signal SIGUSR2`, `time limit`), or nothing while it is not.

        A signal that comes when the deadline is near is the cluster's announcement of the time limit.
        """
        if self._near_deadline:
            return TIME_LIMIT
        return f"signal {self._signal.name}" if self._signal is not None else ""

    @property
    def _near_deadline(self) -> bool:
        return self.deadline is not None and self._clock() >= self.deadline - self.margin_s


def agreed_stop(stop: StopSignal, world: World) -> str:
    """Collective: the reason to stop if any rank has one."""
    import torch

    if not world.max(torch.tensor(float(stop.requested))):
        return ""
    reasons: list[str] = world.gather(stop.reason)
    return next(reason for reason in reasons if reason)


def until_stopped(batches: Iterable[T], stop: StopSignal, world: World) -> Iterator[T]:
    """The batches, equally many on every rank, as long as no rank is asked to stop.

    Raises:
        StopAsked: on all ranks before the same batch.
    """
    for batch in batches:
        reason = agreed_stop(stop, world)
        if reason:
            raise StopAsked(reason)
        yield batch
