"""The batches of one rank, computed when they are asked for, or before that by worker processes."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing.sharedctypes import RawArray
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mtl_dist.batch import Batch
from mtl_dist.data.batches import BatchBuilder, Loaded
from mtl_dist.data.blend import partners_elsewhere
from mtl_dist.data.mixing import Samples, Stream
from mtl_dist.data.partition import EvaluationPartition, TrainingPartition
from mtl_dist.data.settings import BadSampleSettings
from mtl_dist.data.shard_prefetch import ShardPrefetch
from mtl_dist.errors import UserError
from mtl_dist.heartbeat import beat
from mtl_dist.processes import end_with_parent

log = logging.getLogger(__name__)

_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_STACK_SIGNAL = getattr(signal, "SIGRTMIN", None)
"""Has a worker print its stack; None where there are no such signals (macOS)."""
_JUDGED_AT_ONCE = 1000  # a fraction of fewer samples would end runs by chance


class BatchLoader:
    """The batches of one rank, in order, computed early by `workers` processes (0: on demand)."""

    def __init__(
        self, batches: Batches, workers: int, pin_memory: bool, on_bad_sample: BadSampleSettings
    ) -> None:
        self.batches = batches
        self._on_bad_sample = on_bad_sample
        self._loader: Iterable[Loaded | UserError] = batches
        self._workers: Workers | None = None
        if workers == 0:
            return
        self._workers = batches.workers = Workers(workers)
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=range(len(batches)),
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            worker_init_fn=begin_worker,
            # Without one of its own, a DataLoader draws from torch's global generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        seen = num_bad = 0
        # A worker is deaf to them only once it has begun: until then they wait, and it begins by unblocking.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
        try:
            started = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for loaded in self._watched(started):
            if isinstance(loaded, UserError):
                raise loaded
            for problem in loaded.bad:
                log.warning("skipped a bad sample: %s", problem)
            seen += len(loaded.positions)
            num_bad += len(loaded.bad)
            self._judge(num_bad, seen)
            yield loaded.batch()

    def _watched(self, batches: Iterator[Loaded | UserError]) -> Iterator[Loaded | UserError]:
        for number in count():
            waits_for = None if self._workers is None else partial(self._workers.late_with, number)
            beat("waiting for data", waits_for=waits_for)
            try:
                loaded = next(batches)
            except StopIteration:
                return
            beat("computing")
            yield loaded

    def _judge(self, num_bad: int, seen: int) -> None:
        if self._on_bad_sample.kind == "fail" or num_bad == 0:
            return
        started = min(_JUDGED_AT_ONCE, self.batches.num_samples)
        judged = -(-seen // started) * started
        if num_bad > self._on_bad_sample.max_fraction * judged:
            raise UserError(
                f"data.on_bad_sample.max_fraction: expected at most {self._on_bad_sample.max_fraction:g} of "
                f"the samples to be bad, found {num_bad} of {seen}. The log names them: fix the dataset, or "
                "allow more."
            )


class Workers:
    """What the worker processes of one loader do now, in memory that they share with it.

    They take the batches in turn.
    """

    def __init__(self, num: int) -> None:
        self._pids = RawArray("q", num)
        self._batches = RawArray("q", [-1] * num)

    def begins(self, batch: int) -> None:
        """Called by a worker: it begins this batch."""
        info = get_worker_info()
        if info is not None:
            self._pids[info.id], self._batches[info.id] = os.getpid(), batch

    def late_with(self, batch: int) -> str:
        """Who is at a batch that does not come, in words; it prints its stack if it can."""
        worker = next((w for w, at in enumerate(self._batches) if at == batch), batch % len(self._pids))
        name, pid = f"data worker {worker}", int(self._pids[worker])
        if pid == 0:
            return f"{name}, which has not begun"
        try:
            state = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return f"{name} (process {pid}, which is gone)"
        if state == psutil.STATUS_STOPPED:
            return f"{name} (process {pid}, which a signal has stopped)"
        if _STACK_SIGNAL is not None:
            os.kill(pid, _STACK_SIGNAL)
        disk = ", which waits for a disk or network" if state == psutil.STATUS_DISK_SLEEP else ""
        return f"{name} (process {pid}{disk})"


class SampleOrder(Protocol):
    num_samples: int

    def samples(self, positions: np.ndarray) -> Samples: ...


class Batches(Dataset[Loaded | UserError]):
    """A rank's batches by their number: a pure function, so workers need no state."""

    def __init__(
        self,
        partition: TrainingPartition | EvaluationPartition,
        order: SampleOrder,
        builder: BatchBuilder,
        shard_prefetch: ShardPrefetch | None = None,
    ) -> None:
        self.num_samples = order.num_samples
        self._partition = partition
        self.order = order
        self._builder = builder
        self.shard_prefetch = shard_prefetch
        self.workers: Workers | None = None

    def __len__(self) -> int:
        return len(self._partition)

    def __iter__(self) -> Iterator[Loaded | UserError]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Loaded | UserError:
        """The batch; an error for the user is returned, because a worker would bury it in a traceback."""
        if self.workers is not None:
            self.workers.begins(index)
        positions = self._partition.positions(index)
        size, content = len(positions), self._partition.content(positions)
        if self._builder.blender is not None:
            partners = partners_elsewhere(positions, self._partition.end)
            positions, content = np.append(positions, partners), np.append(content, partners)
        samples = self.order.samples(content)
        if self.shard_prefetch is not None and isinstance(self.order, Stream):
            self.shard_prefetch.want(self.order.upcoming(int(content[0])))
        try:
            return self._builder.build(samples, positions, positions < self._partition.end, size)
        except UserError as error:
            return error


def begin_worker(worker: int) -> None:
    """Keep a worker to one thread, and deaf to the signals that Slurm and terminals send to all processes.

    It dies with its rank: it holds copies of that one's connections, which to the other ranks would look
    alive as long as it lived.
    """
    end_with_parent(signal.SIGKILL)
    torch.set_num_threads(1)
    if _STACK_SIGNAL is not None and sys.__stderr__ is not None:
        with suppress(OSError, ValueError):  # a stderr that is no file
            faulthandler.register(_STACK_SIGNAL, file=sys.__stderr__)
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)


@atexit.register
def end_workers() -> None:
    """Kill the workers of a loader that was not read to its end.

    At its exit a process asks them to end with the SIGTERM that they ignore, and would wait for ever. This
    runs before: the module was imported after multiprocessing. torch's handler would take a killed worker for
    a failure and raise it from wherever the exit is.
    """
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in workers:
        process.kill()


def _unchanged(loaded: Any) -> Any:
    return loaded
