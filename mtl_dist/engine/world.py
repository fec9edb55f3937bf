"""The ranks of one run: who am I, which device is mine, and the few collectives that the package needs.

Two planes. Gradients travel over the engine's own process group (NCCL on GPUs, gloo on CPUs). Small control
values (label counts, stop flags, sums for the log) travel over a gloo group of host tensors, so that asking
"does anybody want to stop?" never makes the host wait for a GPU.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist.engine import rank_environment
from mtl_dist.errors import UserError

T = TypeVar("T")

CONTROL_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The ranks of this run. `control` is the gloo group of host tensors (None in a world of one)."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of a host tensor over all ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum of a host tensor over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def device_sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of a tensor on the ranks' devices."""
        if self.size == 1:
            return values
        result = values.clone()
        dist.all_reduce(result)
        return result

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.control is None:
            return values
        result = values.clone()
        dist.all_reduce(result, operation, group=self.control)
        return result

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; its result, or its UserError, comes to every rank."""
        outcome: tuple[T | None, str | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except UserError as error:
                outcome = (None, str(error))
        result, problem = self.broadcast(outcome)
        if problem is not None:
            raise UserError(problem)
        return result

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)


def launched_size() -> int:
    """The number of processes that the launcher says it started (1 without a launcher).

    Raises:
        UserError: the variables of a launcher contradict one another, or some are missing.
    """
    return rank_environment.launched_size(os.environ)


def use_cpu() -> bool:
    """Whether this run computes on CPUs: no GPU here, or `ACCELERATE_USE_CPU` asks for it."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def connected(size: int, rank: int, local_rank: int, device: torch.device) -> World:
    """The world of an initialised process group, checked against what the launcher started.

    Raises:
        UserError: the launcher started several processes that did not become one group. Each would train
            on its own, silently.
    """
    if size != launched_size():
        raise UserError(
            f"launcher: expected one group of {launched_size()} processes, found a group of {size}. "
            "Start them with `accelerate launch`, `torchrun` or `mtl launch`."
        )
    if size == 1:
        return World(rank=0, size=1, local_rank=0, device=device)
    backend = dist.get_backend()
    control = dist.group.WORLD
    if backend != "gloo":
        group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        control = group
    # A process that ends with its group open may abort, and NCCL warns.
    atexit.register(leave)
    return World(rank=rank, size=size, local_rank=local_rank, device=device, control=control)


def join_group() -> World:
    """Join the group that the launcher started; without a launcher, a group of this process alone."""
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = own_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        device_id = device if device.type == "cuda" else None
        if launched_size() == 1:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id
            )
        else:
            dist.init_process_group(backend, device_id=device_id)
    return connected(dist.get_world_size(), dist.get_rank(), local_rank, device)


def own_device(local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cpu") if use_cpu() else torch.device("cuda", local_rank)


@contextmanager
def left_as_found() -> Iterator[None]:
    """Afterwards this process is in no group that it was not in before, and its environment is the same.

    Under a launcher the group stays: the ranks go on together.
    """
    from accelerate.state import AcceleratorState, is_initialized

    environment, in_group, in_accelerate = dict(os.environ), dist.is_initialized(), is_initialized()
    try:
        yield
    finally:
        if launched_size() == 1:
            if not in_group:
                deepspeed = sys.modules.get("deepspeed")
                if deepspeed is not None and deepspeed.comm.is_initialized():
                    # It keeps groups that a later training in this process would take for living ones.
                    deepspeed.comm.destroy_process_group()
                leave()
            if not in_accelerate:
                AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.clear()
            os.environ.update(environment)


def leave() -> None:
    """Leave the group, if there is one. Nothing collective can follow."""
    if dist.is_initialized():
        dist.destroy_process_group()
