"""`mtl launch`: several processes on this machine, as `accelerate launch -m mtl_dist train` starts them.

    mtl launch RECIPE --nproc N
      supervise (here)           forwards signals, returns the exit code, leaves no process behind
      └─ agent.py                accelerate launch, i.e. torchrun: starts the ranks, ends all when one fails
         ├─ mtl train, rank 0
         └─ mtl train, rank 1

A signal goes straight to the ranks, which agree at the next step, save together and leave. From torchrun they
would get a SIGKILL after 30 s; a SIGUSR2 would kill torchrun and orphan them.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from mtl_dist.config.yaml_text import YamlError, parse
from mtl_dist.errors import UserError
from mtl_dist.plural import plural

_PR_SET_CHILD_SUBREAPER = 36

_SECONDS_BETWEEN_LOOKS = 0.2
"""How long the end of a process may stay unseen while others run beside it."""

_SECONDS_TO_FADE = 2.0
"""What helper processes get to notice that their rank has ended."""

_SECONDS_TO_LEAVE = 30.0
"""What a rank gets to save and leave when its launcher is gone."""

_SECONDS_TO_ABORT = 15.0
"""What ranks get to end after a second Ctrl-C."""

_FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGHUP,  # The terminal was closed: save and leave, and do not write to it.
    signal.SIGUSR2: signal.SIGUSR2,
}
"""What the ranks get for what we get."""


@dataclass(frozen=True)
class Launch:
    """What to start: the command, the ranks that it will start, the CPU threads of each, and which GPUs.

    Without `gpus` all that this process may use.
    """

    command: tuple[str, ...]
    num_processes: int
    threads: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machines:
    """Several machines that train together: how many, which one this is, and where on the first they meet."""

    count: int
    rank: int
    host: str
    port: int


def machines_of(nodes: int, node_rank: int | None, rendezvous: str | None) -> Machines | None:
    """The machines of `--nodes`, `--node-rank` and `--rendezvous`; None for this machine alone.

    Raises:
        UserError: one of them is missing, or has no meaning.
    """
    if nodes == 1:
        if node_rank not in (None, 0) or rendezvous is not None:
            raise UserError("--nodes: expected the number of machines beside --node-rank and --rendezvous.")
        return None
    if node_rank is None or not 0 <= node_rank < nodes:
        found = "none" if node_rank is None else str(node_rank)
        raise UserError(f"--node-rank: expected 0 to {nodes - 1}, another on each machine, found {found}.")
    host, _, port = (rendezvous or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            "--rendezvous: expected HOST:PORT, an address of the first machine and a free port there, "
            f"found {rendezvous or 'none'}. Give the same on all machines."
        )
    return Machines(nodes, node_rank, host.strip("[]"), int(port))


def check_rendezvous(machines: Machines) -> None:
    """Refuse a meeting place that cannot be one, before anything waits for it.

    Raises:
        UserError: its name is not known here; on the first machine, it is none of its addresses, or taken.
    """
    host, port = machines.host, machines.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--rendezvous: expected an address of the first machine, found {host}: {said}."
        ) from None
    if machines.rank > 0:
        return
    refusals = [_refusal_to_listen(family, address) for family, _, _, _, address in found]
    if errno.EADDRINUSE in refusals:
        raise UserError(f"--rendezvous: expected a free port of {host}, found {port}, which is in use.")
    if all(number == errno.EADDRNOTAVAIL for number in refusals):
        raise UserError(
            f"--rendezvous: expected an address of the first machine, which --node-rank 0 says this is, "
            f"found {host}, which is none of this machine's."
        )


def _refusal_to_listen(family: int, address: Any) -> int | None:
    """Why nothing can listen there, as `errno` has it; None where something can."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        return error.errno
    return None


def plan_launch(
    arguments: Sequence[str],
    nproc: int | None,
    config_file: Path | None,
    num_gpus: int,
    machines: Machines | None = None,
) -> Launch | None:
    """How to run `python -m mtl_dist ARGUMENTS` in `nproc` processes, on each of `machines`.

    Without `nproc` the number is the config file's, or else one per GPU (one on a machine without). None
    where a single process does without a launcher. The launch holds the number on all machines.

    Raises:
        UserError: the config file is not one of accelerate's, is for several machines, or there are fewer
            GPUs than processes.
    """
    config = _read_config(config_file) if config_file is not None else {}
    if machines is not None and nproc is None and num_gpus == 0:
        raise UserError("--nproc: expected the processes of each machine, which has no GPU, found none.")
    num_processes = nproc or (config.get("num_processes") if machines is None else None) or max(1, num_gpus)
    on_gpus = num_gpus > 0 and config.get("gpu_ids", "all") == "all"
    if on_gpus and num_processes > num_gpus:
        raise UserError(
            f"--nproc: expected at most {num_gpus}, the GPUs of this machine, found {num_processes}. "
            "To train on its CPUs add --config-file launch/ddp-cpu.yaml."
        )
    if config_file is not None:
        how = ["--config_file", str(config_file)]
    elif num_processes > 1 or machines is not None:
        # Everything is said, so that a default config of the user's home does not decide it.
        how = ["--multi_gpu", "--gpu_ids", "all", "--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        return None
    # The ranks share the cores that this process may use.
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    if machines is None:
        how += ["--num_machines", "1", "--main_process_port", "0"]  # any free one
    else:
        num_processes *= machines.count
        how += ["--num_machines", str(machines.count), "--machine_rank", str(machines.rank)]
        how += ["--main_process_ip", machines.host, "--main_process_port", str(machines.port)]
        how += ["--rdzv_backend", "static", "--same_network"]
        if config.get("distributed_type") == "DEEPSPEED":
            how += ["--deepspeed_multinode_launcher", "standard"]  # its own would go to the others by ssh
    command = [sys.executable, "-m", "mtl_dist.launch.agent", *how, "--num_processes", str(num_processes)]
    command += ["--module", "mtl_dist", *arguments]
    return Launch(tuple(command), num_processes, threads)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config, _ = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(f"{path}: expected a config file of `accelerate launch`, found: {error}.") from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise UserError(f"{path}: expected a config file of `accelerate launch`, found no distributed_type.")
    if config.get("num_machines", 1) != 1:
        raise UserError(
            f"{path}: expected num_machines 1, found {config['num_machines']}. "
            "Give --nodes, --node-rank and --rendezvous, or use `mtl submit` on a cluster."
        )
    return config


def supervise(launch: Launch) -> int:
    """Run the launch to its end; returns the exit code: the failed rank's, or 128 + n after signal n.

    No process of it outlives this function, also if its launcher is killed.
    """
    codes: list[int] = []
    signalled = supervise_all(
        1, 1, lambda number, slot: (launch, None), lambda number, code: codes.append(code)
    )
    return signalled or codes[0]


def supervise_all(
    count: int,
    parallel: int,
    start: Callable[[int, int], tuple[Launch, IO[bytes] | None]],
    ended: Callable[[int, int], None],
) -> int:
    """Run `count` launches to their ends, `parallel` at a time; 0, or 128 + n after signal n.

    `start(number, slot)` says what runs in one of the `parallel` slots, and where its output goes (None:
    where this process speaks); `ended(number, exit code)` hears how it went. A signal is forwarded, and no
    more is started. No process outlives this function.
    """
    others = set(psutil.Process().children(recursive=True))
    _adopt_orphans()
    waiting, slots = list(range(count)), list(range(parallel))
    running: dict[tuple[int, int], subprocess.Popen[bytes]] = {}
    with forwarding(running.values()) as received:
        patience = _Patience(received)
        try:
            while running or (waiting and not received):
                patience.enforce(running.values())
                while waiting and slots and not received:
                    number, slot = waiting.pop(0), slots.pop(0)
                    process = _start(*start(number, slot))
                    running[number, slot] = process
                    if received:  # It came while the process was being made, and was not forwarded.
                        process.terminate()
                for (number, slot), process in list(running.items()):
                    with suppress(subprocess.TimeoutExpired):
                        code = process.wait(timeout=_SECONDS_BETWEEN_LOOKS / len(running))
                        del running[number, slot]
                        slots.append(slot)
                        _end_leftovers(others, running.values())
                        ended(number, 128 + received[0] if received else shell_code(code))
        finally:
            for process in running.values():  # Only if the caller's functions raised.
                process.terminate()
                process.wait()
    return 128 + received[0] if received else 0


def _start(launch: Launch, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    environ = {"OMP_NUM_THREADS": str(launch.threads), **os.environ}
    if launch.gpus:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(launch.gpus)
    # In a session of its own, so that a Ctrl-C reaches the ranks once, from here.
    process = subprocess.Popen(
        launch.command, env=environ, start_new_session=True, stdout=output, stderr=output
    )
    if output is not None:
        output.close()
    return process


class _Patience:
    """How long ranks may take that were asked to end; then those that cannot are killed.

    A rank that hangs ends by itself (hangs/): not one that a signal has stopped, nor one that hangs where no
    Python runs when Ctrl-C comes twice.
    """

    def __init__(self, received: Sequence[int]) -> None:
        self._received = received
        self._asked = self._aborted = math.inf

    def enforce(self, processes: Iterable[subprocess.Popen[bytes]]) -> None:
        """Kill what has had its time."""
        now = time.monotonic()
        if self._received:
            self._asked = min(self._asked, now)
        if self._received.count(signal.SIGINT) > 1:
            self._aborted = min(self._aborted, now)
        if now - self._asked < min(_SECONDS_TO_LEAVE, _SECONDS_TO_ABORT):
            return
        for rank in [rank for process in processes for rank in ranks_of(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                stopped = rank.status() == psutil.STATUS_STOPPED and now - self._asked > _SECONDS_TO_LEAVE
                if stopped or now - self._aborted > _SECONDS_TO_ABORT:
                    rank.kill()


def shell_code(code: int) -> int:
    """A process's exit code as a shell says it: 128 + n for a death by signal n."""
    return code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """Become the parent of ranks whose launcher dies, so that they can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


@contextmanager
def forwarding(running: Collection[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward signals to the ranks of what is running; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in list(running):
            ranks = ranks_of(process.pid)
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(_FORWARDED[signal.Signals(number)])
            if not ranks:
                process.terminate()  # A training without a launcher; or nothing has started yet.

    # Under nohup the terminal's end is to be ignored.
    numbers = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ranks_of(agent: int) -> list[psutil.Process]:
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(agent).children():
            with suppress(psutil.Error):
                if "RANK" in process.environ():
                    ranks.append(process)
    return ranks


def _end_leftovers(others: set[psutil.Process], running: Collection[subprocess.Popen[bytes]]) -> None:
    """End what a launcher left behind: its ranks, if it was killed. They are this process's children then."""
    busy = {process.pid for process in running}
    left = [child for child in psutil.Process().children() if child not in others and child.pid not in busy]
    for orphan in list(left):
        with suppress(psutil.NoSuchProcess):
            left += orphan.children(recursive=True)
    _, left = psutil.wait_procs(left, timeout=_SECONDS_TO_FADE)
    if not left:
        return
    with suppress(OSError):  # the terminal may be gone as well
        print(
            f"The launcher is gone; ending {plural(len(left), 'process', 'processes')} that it left.",
            file=sys.stderr,
            flush=True,
        )
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(left, timeout=_SECONDS_TO_LEAVE)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left)
