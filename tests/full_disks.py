"""Disks that are full for real: no file grows beyond a limit, whoever writes it."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def fill_disk(limit: int) -> None:
    """From now on no file of this process, and of those it starts, grows beyond `limit` bytes.

    What Python compiles is not written either: it does not look how much of a .pyc was (CPython 3.11 to 3.13,
    `_write_atomic`), and one cut off fails every later import, of any process, with "marshal data too short".
    """
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """`fill_disk` for a while."""
    flag, variable = sys.dont_write_bytecode, os.environ.get("PYTHONDONTWRITEBYTECODE")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill_disk(limit)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = flag
        if variable is None:
            del os.environ["PYTHONDONTWRITEBYTECODE"]
        else:
            os.environ["PYTHONDONTWRITEBYTECODE"] = variable
