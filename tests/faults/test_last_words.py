"""A mistake is always said: whichever rank ends first, its lines have been printed before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = """
import os, pathlib, sys, time
from mtl_dist.commands import errors
from mtl_dist.errors import UserError

errors._SECONDS_FOR_RANK_0 = 1.0
children = []
for rank in range(3):
    child = os.fork()
    if child == 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
        time.sleep({delays}[rank])
        errors.report(UserError({messages}[rank]))
        os._exit(2)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def ended(tmp_path: Path, delays: list[float], messages: list[str]) -> tuple[str, list[str]]:
    """Three ranks of one launcher that end by a mistake: their exit codes, and the lines printed."""
    script = RANKS.format(delays=delays, messages=messages)
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ)
    return done.stdout.strip(), sorted(done.stderr.splitlines())


@pytest.mark.parametrize(
    ("delays", "messages", "lines"),
    [
        ([0, 0, 0], ["a", "a", "a"], ["a"]),
        ([0.3, 0, 0], ["a", "a", "a"], ["a"]),
        ([0, 0, 0], ["a", "a", "b"], ["a", "rank 2: b"]),
    ],
)
def test_ranks_with_one_mistake_print_it_once(
    tmp_path: Path, delays: list[float], messages: list[str], lines: list[str]
) -> None:
    assert ended(tmp_path, delays, messages) == ("[2, 2, 2]", lines)
    assert list(tmp_path.iterdir()) == []


def test_where_rank_0_is_late_another_rank_has_spoken_before_it_ends(tmp_path: Path) -> None:
    codes, lines = ended(tmp_path, [3, 0, 0], ["a", "a", "a"])
    assert codes == "[2, 2, 2]"
    assert len(lines) == 1
    assert lines[0] in ("rank 1: a", "rank 2: a")


def test_a_rank_that_is_killed_while_it_speaks_has_another_speak(tmp_path: Path) -> None:
    killed = RANKS.replace(
        "        errors.report(",
        "        if rank == 0:\n"
        "            errors._print = lambda lines: os.kill(os.getpid(), 9)\n"
        "        errors.report(",
    ).format(delays=[0, 0, 0], messages=["a", "a", "a"])
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True, env=environ)
    assert done.stdout.strip() == f"[{-signal.SIGKILL}, 2, 2]"
    assert done.stderr in ("rank 1: a\n", "rank 2: a\n")
