"""How a process begins and ends: with the one that started it, and without a last look for garbage."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process the signal when its parent dies, even by SIGKILL; elsewhere nothing.

    The parent is the thread that started this process: it has to live as long as it needs the process.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(128 + number)


def end_at_once() -> None:
    """Have this process look for no garbage when it ends: with torch in it that takes a second or more."""
    atexit.register(gc.freeze)
