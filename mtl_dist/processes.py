"""How a process begins and ends: with the one that started it, and without a last look for garbage."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Have this process end as soon as its threads and its atexit functions have, by the code of the block.

    Python would look for garbage first, which takes a second or more with torch in it. To keep it from that
    alone (`gc.freeze`) makes extensions report what is left as leaked: Triton 3.9 does, in thirty lines.
    """
    codes: list[int] = []

    def leave() -> None:
        if codes:
            with suppress(OSError, ValueError):  # then Python goes on, and says what is wrong with the stream
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()
                os._exit(codes[0])

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        yield
    except SystemExit as error:
        codes.append(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise
    codes.append(0)
