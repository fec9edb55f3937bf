"""How a process of the package ends."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--verzion", 2)])
def test_a_command_looks_for_no_garbage_when_it_ends(argument: str, code: int) -> None:
    source = "import atexit, gc\natexit.register(lambda: print(gc.get_freeze_count()))\n"
    source += "from mtl_dist.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", source, argument], capture_output=True, text=True)
    assert done.returncode == code
    assert int(done.stdout.split()[-1]) > 10_000
