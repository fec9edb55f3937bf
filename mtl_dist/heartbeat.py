"""Where the main thread of this process is: what it has begun last, for whoever watches over it.

    beat("forward")            the main thread begins something; costs less than a microsecond
    getting_on()               it is still at the same, and gets on with it: one of many figures is drawn
    with during("val"): ...    what it is a part of

All ranks of a run begin the same things in the same order, so the count of beats says who is behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Beat:
    """What began last.

    `turn` counts the beats; `slow` is what may take long without anything being wrong, such as saving.
    `waits_for` says, in words, for which helper process this one waits.
    """

    turn: int = 0
    phase: str = "the start"
    step: int = 0
    slow: bool = True
    waits_for: Callable[[], str] | None = None

    @property
    def words(self) -> str:
        return f"{self.phase}, step {self.step}" if self.step else self.phase


class _Pulse:
    """The last beat, and what it is a part of: one per process, as there is one main thread."""

    def __init__(self) -> None:
        self.last = Beat()
        self.part_of = ""


_pulse = _Pulse()


def beat(
    phase: str, step: int | None = None, *, slow: bool = False, waits_for: Callable[[], str] | None = None
) -> None:
    """The main thread begins `phase`; without `step` it is still at the same one."""
    last = _pulse.last
    name = f"{phase} ({_pulse.part_of})" if _pulse.part_of else phase
    _pulse.last = Beat(last.turn + 1, name, last.step if step is None else step, slow, waits_for)


def getting_on() -> None:
    """Progress that one rank makes alone: the count of beats stays as the other ranks have it."""
    _pulse.last = replace(_pulse.last)


def last_beat() -> Beat:
    """What began last; the same object until there is progress."""
    return _pulse.last


@contextmanager
def during(part_of: str) -> Iterator[None]:
    """What begins within is a part of this: an evaluation."""
    before, _pulse.part_of = _pulse.part_of, part_of
    try:
        yield
    finally:
        _pulse.part_of = before
