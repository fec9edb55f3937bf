"""`accelerate launch`, run by `mtl launch` in a process of its own, that keeps the ranks' exit codes.

torchrun, which accelerate uses, ends with exit code 1 and a page of its own stack whatever a rank's exit code
was. Here a user's mistake stays the lines that the ranks printed, and exit code 2.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Mapping

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from mtl_dist.launch.local import shell_code
from mtl_dist.processes import end_with_parent, ending_at_once

USER_ERROR = 2
"""What a rank exits with when the user can fix it, once the lines are printed."""


@ending_at_once()
def main() -> None:
    """Launch as the arguments say; exit as the rank that failed first did."""
    end_with_parent(signal.SIGTERM)  # torchrun then ends the ranks
    _silence_torchrun()
    arguments = launch_command_parser().parse_args()
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        codes = {rank: failure.exitcode for rank, failure in failures}
        sys.exit(report(codes, int(arguments.num_machines or 1)))
    except (DistError, RendezvousError) as error:
        # From between the machines: the ranks have said nothing.
        last = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"{arguments.main_process_ip}:{arguments.main_process_port}"
        print(
            f"--rendezvous: expected all machines at {where}, found: {last}. "
            "Is the first one started, and reached from here by this address?",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    except subprocess.CalledProcessError as error:
        sys.exit(shell_code(error.returncode))
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _silence_torchrun() -> None:
    """No page of its stack: each of its loggers has a level of its own."""
    of_torchrun = "torch.distributed.elastic"
    for name in (of_torchrun, *logging.root.manager.loggerDict):
        if name.startswith(of_torchrun):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def report(exit_codes: Mapping[int, int], num_machines: int = 1) -> int:
    """Say which rank failed first, unless it has said so itself, and return its exit code.

    `exit_codes` holds the failed ranks, first failure first. A user's mistake is never the consequence of
    anything, so it counts before what it made fail elsewhere. Those that torchrun ended because of it (by
    SIGTERM) count only if there is no other.
    """
    rank, code = min(
        exit_codes.items(), key=lambda failure: (failure[1] != USER_ERROR, failure[1] == -signal.SIGTERM)
    )
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"rank {rank} was killed by {name}{hint}; the others were ended.", file=sys.stderr)
    elif code != USER_ERROR:
        line = f"rank {rank} failed with exit code {code}; the others were ended."
        if num_machines > 1:
            line += " If the first failure was another machine's, it is said there."
        print(line, file=sys.stderr)
    return shell_code(code)


if __name__ == "__main__":
    main()
