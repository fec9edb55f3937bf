"""How a command ends when something is wrong.

exit code 2    the user can fix it: the lines of a UserError on stderr, or typer's own about the options
exit code 1    a bug or a broken machine: a traceback
exit code 130  Ctrl-C
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from mtl_dist.config.trust import VARIABLE
from mtl_dist.durable import locked
from mtl_dist.engine.rank_environment import own_rank, own_size
from mtl_dist.errors import UserError
from mtl_dist.printable import say

USER_ERROR = 2
INTERRUPTED = 130

SECONDS_FOR_RANK_0 = 2.0
"""What the other ranks wait before they speak."""

_POLL_S = 0.05

_NOT_TO_BE_USED = {
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
}
"""What is wrong with a path, or its disk, and with no code."""

TRUST = "--trust"


class Listing(TyperGroup):
    """Commands that `--help` lists below their panels, each with the whole first sentence of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            first, _, _ = (command.help or "").partition("\n\n")
            panel = panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", [])
            panel.append((name, " ".join(first.split())))
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class CommandGroup(Listing):
    """The commands of `mtl`, with a UserError turned into its lines and exit code 2.

    Each takes `--trust` at any place.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = args[: args.index("--")] if "--" in args else args
        if TRUST in given:
            args = [arg for arg in given if arg != TRUST] + args[len(given) :]
            os.environ[VARIABLE] = "1"  # also for the ranks that this process may start
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            report(error)
            raise typer.Exit(USER_ERROR) from None
        except OSError as error:
            if error.filename is None or error.errno not in _NOT_TO_BE_USED:
                raise
            name = os.fsdecode(error.filename)
            report(UserError(f"{name}: expected a path that can be used, found: {error.strerror}."))
            raise typer.Exit(USER_ERROR) from None


def report(error: UserError) -> None:
    """Print the lines of a mistake, once for all ranks of this machine.

    When a rank ends, its launcher ends the others, perhaps before they have spoken. So no rank returns from
    here before the lines have been printed, by whichever came first. Rank 0, which usually makes the same
    mistake, is given a moment; a rank that is alone with its mistake (an image that only it read) speaks for
    itself.
    """
    rank = own_rank(os.environ)
    lines = str(error).splitlines()
    if "RANK" not in os.environ:
        _print(lines)
        return
    digest = hashlib.sha256(str(error).encode()).hexdigest()
    said = _said_by_ranks(os.environ)
    if rank > 0:
        deadline = time.monotonic() + SECONDS_FOR_RANK_0
        while time.monotonic() < deadline and digest not in _content(said):
            time.sleep(_POLL_S)
        lines = [f"rank {rank}: {line}" for line in lines]
    try:
        with locked(said):
            before = said.read_text().split()
            if digest not in before:
                _print(lines)
            after = [*before, digest]
            said.write_text("\n".join(after))
            if len(after) == own_size(os.environ):
                said.unlink()
    except OSError:  # nowhere to agree: twice is better than never
        _print(lines)


def _print(lines: list[str]) -> None:
    for line in lines:
        say(line, sys.stderr)


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _said_by_ranks(environ: Mapping[str, str]) -> Path:
    """The file in which the ranks that one launcher started here keep the digests of what they have said.

    They have their parent in common; its start tells it from an earlier process of that number.
    """
    import psutil

    try:
        parent = f"{os.getppid()}-{psutil.Process(os.getppid()).create_time():.2f}"
    except psutil.Error:
        parent = f"{os.getppid()}-{environ.get('MASTER_PORT', '')}"
    return Path(tempfile.gettempdir()) / f".mtl-{os.getuid()}-{parent}"
