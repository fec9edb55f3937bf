"""`--pdb`: the debugger, where a command failed."""

from __future__ import annotations

import pdb
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mtl_dist.engine.world import launched_size
from mtl_dist.errors import UserError


@contextmanager
def post_mortem(wanted: bool) -> Iterator[None]:
    """Opens the debugger at an error of the block, where that is wanted; then the error goes on.

    Raises:
        UserError: wanted under a launcher of several processes, which share one terminal.
    """
    if wanted and launched_size() > 1:
        raise UserError(
            f"--pdb: expected one process, found a launcher with {launched_size()}, which share one "
            "terminal. Run `mtl train` itself."
        )
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if wanted:
            traceback.print_exc()
            print("q leaves the debugger, w shows where you are, u and d go up and down.", file=sys.stderr)
            pdb.post_mortem(error.__traceback__)
        raise
