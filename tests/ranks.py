"""Real ranks on this machine: processes that form one gloo group and run one function together.

    with RankPool(2) as ranks:
        first, second = ranks.run(work, "argument")     # work("argument") on every rank

The processes stay for many calls, so their start (torch and the libraries of a run take seconds to import) is
paid once. Whatever raises, dies or hangs on one rank ends the whole pool, and the next call starts a new one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any


class RankFailure(AssertionError):
    """A rank raised, died, or did not answer in time; the message holds the traceback of the first."""


class RankPool:
    """`size` processes with the environment that a launcher gives them (RANK, WORLD_SIZE, ...).

    The rendezvous is a store of this process, so no port has to be guessed.
    """

    def __init__(self, size: int, timeout_s: float = 240.0) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank, and what each returned, by rank.

        `function` is a module-level function; arguments and results are pickled, tensors by value.

        Raises:
            RankFailure: it did not return on every rank.
        """
        try:
            return self._run(function, args)
        except BaseException:
            # Also when the caller is interrupted: an answer still on its way is none to the next call.
            self.close()
            raise

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        results: dict[int, Any] = {}
        problems: list[str] = []
        deadline = time.monotonic() + self._timeout_s
        while len(results) < self.size and not problems:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = set(wait(waiting, timeout=max(0.0, deadline - time.monotonic())))
            if not ready:
                problems.append(f"no answer within {self._timeout_s:g} s from ranks {self._missing(results)}")
            for rank, pipe in enumerate(self._pipes):
                if pipe not in ready:
                    continue
                try:
                    failed, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(5)
                    failed, results[rank] = True, f"exit code {self._processes[rank].exitcode}"
                if failed:
                    problems.append(f"rank {rank}: {results[rank]}")
        if problems:
            raise RankFailure("\n".join(problems))
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes, self._store = [], [], None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            here, there = context.Pipe()
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_WORLD_SIZE": str(self.size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "ACCELERATE_USE_CPU": "true",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            }
            process = context.Process(target=_serve, args=(there, environment), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _missing(self, results: dict[int, Any]) -> list[int]:
        return [rank for rank in range(self.size) if rank not in results]


@cache
def shared_pool(size: int) -> RankPool:
    """The pool of `size` ranks that all tests of a session share.

    Only for functions that leave nothing behind but an initialised process group.
    """
    pool = RankPool(size)
    atexit.register(pool.close)
    return pool


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Run what comes through the pipe, until it closes."""
    os.environ.update(environment)
    from tests.undrawn import undrawn

    with undrawn():
        _answer(pipe)


def _answer(pipe: Connection) -> None:
    """One call after the other."""
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(message)
            answer = pickle.dumps((False, function(*args)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        try:
            pipe.send_bytes(answer)
        except BrokenPipeError:  # another rank failed first, and the pool is closed
            return
