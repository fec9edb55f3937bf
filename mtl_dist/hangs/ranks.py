"""What ranks report to one another when nothing else works: who is alive, how far, who has failed first.

Through the store by which the group was formed, over connections of its own: a collective that hangs, or a
rank that is gone, does not matter to it. The launcher holds the store; under srun rank 0 does.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from mtl_dist.heartbeat import last_beat

_numbers = itertools.count()
"""Of the runs of this process: its group, and with it the store, may serve one after the other."""


@dataclass(frozen=True)
class Pulse:
    """What a rank reports: how often it has, how far it is, and after an alarm where exactly.

    `stack` is that of its main thread; `waits_for` the helper process that it waits for, in words.
    """

    reports: int
    turn: int
    where: str
    host: str
    pid: int
    stack: str = ""
    waits_for: str = ""

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.host}, process {self.pid})"

    @property
    def line(self) -> str:
        """The innermost line of the stack that is no library's: `own_losses.py:12`."""
        lines = [line.strip() for line in self.stack.splitlines() if line.strip().startswith("File ")]
        own = [line for line in lines if "site-packages" not in line and "/lib/python" not in line]
        if not own:
            return ""
        path, _, rest = own[-1].removeprefix('File "').partition('", line ')
        return f"{os.path.basename(path)}:{rest.partition(',')[0]}"


@dataclass(frozen=True)
class Failure:
    """The first error of a run, by the rank that met it; `mistake` is one that the user can fix."""

    rank: int
    reason: str
    mistake: bool = False


def own_pulse(reports: int, main_thread: int, *, stack: bool) -> Pulse:
    """This rank's pulse."""
    latest = last_beat()
    text, waits_for = "", ""
    if stack:
        frame = sys._current_frames().get(main_thread)
        text = "".join(traceback.format_stack(frame)) if frame is not None else ""
        waits_for = latest.waits_for() if latest.waits_for is not None else ""
    return Pulse(reports, latest.turn, latest.words, platform.node(), os.getpid(), text, waits_for)


class Ranks:
    """One rank's line to the others. Every call may raise a RuntimeError: who holds the store has ended."""

    def __init__(self, rank: int, size: int, store: Any, name: str) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._name = name
        self._alarm, self._end, self._failure = f"{name}/alarm", f"{name}/end", f"{name}/failure"

    @classmethod
    def of_group(cls, rank: int, size: int) -> Ranks:
        """Of the process group that this rank is in."""
        store = dist.distributed_c10d._get_default_store().clone()
        return cls(rank, size, store, f"mtl/{next(_numbers)}")

    def clone(self) -> Ranks:
        """A line of its own, for another thread."""
        return Ranks(self.rank, self.size, self._store.clone(), self._name)

    def report(self, pulse: Pulse) -> None:
        self._store.set(f"{self._name}/{self.rank}", json.dumps(asdict(pulse)))

    def pulses(self) -> dict[int, Pulse]:
        """What each rank has reported last; those that have reported nothing yet are missing."""
        found = {}
        for rank in range(self.size):
            key = f"{self._name}/{rank}"
            if self._store.check([key]):
                found[rank] = Pulse(**json.loads(self._store.get(key)))
        return found

    def raise_alarm(self) -> None:
        self._store.set(self._alarm, "1")

    def hear_alarm(self) -> bool:
        return bool(self._store.check([self._alarm]))

    def report_end(self, code: int) -> None:
        """That this rank ends by an error, so that no other will get further; `code` is its exit code."""
        self._store.compare_set(self._end, "", str(code))

    def hear_end(self) -> int | None:
        """The exit code of the first rank that reported its end."""
        return int(self._store.get(self._end)) if self._store.check([self._end]) else None

    def hear_failure(self) -> Failure | None:
        if not self._store.check([self._failure]):
            return None
        return Failure(**json.loads(self._store.get(self._failure)))

    def first_failure(self, own: Failure) -> Failure:
        """The first failure that any rank has reported: `own`, if no other was before."""
        return Failure(**json.loads(self._store.compare_set(self._failure, "", json.dumps(asdict(own)))))

    def lost_rank(self, patience_s: float) -> Failure | None:
        """A rank that reports nothing more within `patience_s`; None if one says why it failed."""
        before = self.pulses()
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            time.sleep(patience_s / 8)
            if self.hear_failure():
                return None
        now = self.pulses()
        silent = sorted(silent_ranks(before, now) - {self.rank})
        if not silent:
            return None
        rank = silent[0]
        return Failure(
            rank,
            f"{now[rank].name(rank)} ended without a word in {now[rank].where}: it was killed (out of "
            "memory?), or its machine is lost",
        )


def silent_ranks(before: Mapping[int, Pulse], now: Mapping[int, Pulse]) -> set[int]:
    """The ranks that have reported nothing between two looks."""
    return {rank for rank, pulse in now.items() if rank in before and before[rank].reports == pulse.reports}


def culprits(pulses: Mapping[int, Pulse], silent: Collection[int]) -> list[int]:
    """The ranks for which the others wait: the silent ones, or else those that are behind."""
    if silent:
        return sorted(silent)
    behind = min(pulse.turn for pulse in pulses.values())
    return [rank for rank, pulse in sorted(pulses.items()) if pulse.turn == behind]


def reason_of_hang(pulses: Mapping[int, Pulse], silent: Collection[int], limit: str) -> str:
    """One line: who hung, and where; `limit` is how long was waited, in words."""
    guilty = culprits(pulses, silent)
    first = pulses[guilty[0]]
    if len(pulses) == 1:
        who = "it"
    elif len(guilty) == len(pulses):
        who = "all ranks"
    else:
        who = ", ".join(pulses[rank].name(rank) for rank in guilty)
    where = f" at {first.line}" if first.line else ""
    if silent:
        what = f"{who} did not answer in {first.where}: stopped, or its machine is lost"
    elif first.waits_for:
        what = f"{who} got no data from {first.waits_for}, {first.where}"
    else:
        what = f"{who} stayed in {first.where}{where}"
    return f"hang: {what}; no progress in {limit}, so the run was ended"
