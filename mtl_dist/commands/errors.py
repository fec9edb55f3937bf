"""How a command ends when something is wrong.

exit code 2    the user can fix it: the lines of a UserError on stderr, or typer's own about the options
exit code 1    a bug or a broken machine: a traceback
exit code 130  Ctrl-C
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import typer
from typer.core import TyperGroup

from mtl_dist.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130

_SECONDS_FOR_RANK_0 = 2.0
"""What the other ranks wait before they speak."""


class CommandGroup(TyperGroup):
    """The commands of `mtl`, with a UserError turned into its lines and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            report(error)
            raise typer.Exit(USER_ERROR) from None


def report(error: UserError) -> None:
    """Print the lines of a mistake, once for all ranks.

    Rank 0 usually makes the same mistake and says so; its launcher then ends the others while they wait. A
    rank that is alone with its mistake (an image that only it read) speaks for itself.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(_SECONDS_FOR_RANK_0)
    for line in str(error).splitlines():
        print(f"rank {rank}: {line}" if rank > 0 else line, file=sys.stderr)
    sys.stderr.flush()
