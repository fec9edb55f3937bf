"""Several processes at once: slots, exit codes, a signal that reaches all, nobody left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from mtl_dist.launch.local import Launch, supervise_all

SAVES = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); open({!r}, 'w')\n"
    "for _ in range(600): time.sleep(0.1)  # a signal just before a call is acted on after it"
)


def launch(code: str) -> Launch:
    return Launch((sys.executable, "-S", "-c", code), 1, 1)


def test_all_run_never_more_at_once_than_there_are_slots_and_every_exit_code_is_heard() -> None:
    slots: list[int] = []
    codes: dict[int, int] = {}

    def start(number: int, slot: int) -> tuple[Launch, None]:
        slots.append(slot)
        assert len(slots) - len(codes) <= 2
        return launch(f"raise SystemExit({number})"), None

    assert supervise_all(4, 2, start, codes.__setitem__) == 0
    assert codes == {0: 0, 1: 1, 2: 2, 3: 3}
    assert slots[:2] == [0, 1] and set(slots) == {0, 1}


def test_a_signal_reaches_all_that_run_and_starts_no_more(tmp_path: Path) -> None:
    started: list[int] = []
    ended: list[int] = []

    def start(number: int, slot: int) -> tuple[Launch, None]:
        started.append(number)
        if number == 2:
            # The third starts when the first has ended; then the signal comes, while the second still runs.
            os.kill(os.getpid(), signal.SIGTERM)
        return launch(SAVES.format(str(tmp_path / f"{number}")) if number else "pass"), None

    code = supervise_all(4, 2, start, lambda number, code: ended.append(number))
    assert code == 128 + signal.SIGTERM
    assert started == [0, 1, 2]
    assert sorted(ended) == [0, 1, 2]


def test_an_error_of_the_caller_leaves_no_process_behind() -> None:
    def ended(number: int, code: int) -> None:
        raise ValueError("stop")

    def start(number: int, slot: int) -> tuple[Launch, None]:
        return launch("pass" if number == 0 else "import time; time.sleep(60)"), None

    before = psutil.Process().children()
    with pytest.raises(ValueError, match="stop"):
        supervise_all(2, 2, start, ended)
    assert psutil.Process().children() == before
