"""How a process of the package ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, sys, threading, time
from mtl_dist.processes import ending_at_once

class Garbage:
    def __del__(self):
        print("looked for garbage")

kept = Garbage()

@ending_at_once()
def main():
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("main")
    {}

main()
"""


def run(body: str, **options: int) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE} | options
    command = [sys.executable, "-c", PROGRAM.format(body)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('words')", 1, "words\n"),
    ],
)
def test_threads_and_functions_at_exit_come_to_their_end_and_nothing_after_them(
    body: str, code: int, said: str
) -> None:
    done = run(body)
    assert done.returncode == code
    assert done.stdout.split("\n") == ["main", "thread", "at exit", ""]
    assert done.stderr == said


def test_an_error_is_reported_as_python_does() -> None:
    done = run("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_output_that_cannot_be_written_is_reported_as_python_does() -> None:
    with open("/dev/full", "w") as full:
        done = run("pass", stdout=full.fileno())
    assert done.returncode == 120
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--verzion", 2)])
def test_a_command_ends_so(argument: str, code: int, tmp_path: Path) -> None:
    source = "import atexit, os\nend = os._exit\n"
    source += "os._exit = lambda code: (print('at once', flush=True), end(code))\n"
    source += "from mtl_dist.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", source, argument], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "at once"
