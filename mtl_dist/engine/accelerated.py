"""The accelerate engine: one process, or DistributedDataParallel over NCCL or gloo."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from mtl_dist.batch import Outputs
from mtl_dist.engine.engine import StepResult
from mtl_dist.engine.precision import LossScaler
from mtl_dist.engine.replicated import ReplicatedEngine
from mtl_dist.engine.world import World, connected, launched_size, use_cpu


def connect_accelerate() -> tuple[Accelerator, World]:
    """Join the group that the launcher started.

    `Accelerator()` on a machine without a GPU would make two separate trainings of two processes; with
    `cpu=True` they are one gloo group. Its own mixed precision stays off: autocast is the root module's.
    """
    accelerator = Accelerator(
        cpu=use_cpu(),
        mixed_precision="no",
        # The root module runs every head on every rank, and we average the buffers once per step ourselves.
        # Nothing is unused: the option keeps DDP from regrouping its buckets after the first step, which adds
        # gradients of more than two ranks in another order: resuming would differ in the last bits.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=launched_size() > 2,
            )
        ],
    )
    world = connected(
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.local_process_index,
        accelerator.device,
    )
    return accelerator, world


class AccelerateEngine(ReplicatedEngine):
    """`root` on one device, or wrapped by DDP: gradients are averaged over the ranks."""

    def __init__(
        self,
        accelerator: Accelerator,
        world: World,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None = None,
    ) -> None:
        super().__init__(world, root, optimizer, scaler)
        self._wrapped: Any = root
        if world.size > 1:
            with warnings.catch_warnings():
                # Newer releases of torch spell it in two arguments, the older ones do not know those.
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
                self._wrapped = accelerator.prepare_model(root)

    def forward_backward(self, *inputs: Any, last: bool) -> tuple[Tensor, Outputs]:
        silent = self._wrapped.no_sync() if self.world.size > 1 and not last else nullcontext()
        with silent:
            scalar, sums, outputs = self._wrapped(*inputs)
            (scalar if self.scaler is None else scalar * self.scaler.scale).backward()
        self._watch(sums)
        return sums, outputs

    def step(self, absent: Iterable[nn.Parameter], clip_norm: float | None) -> StepResult:
        return self._update(absent, clip_norm)
