"""The accelerate engine: one process, or DistributedDataParallel over NCCL or gloo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from mtl_dist.engine.engine import Engine, FullState, StepResult, average_buffers, host_copy
from mtl_dist.engine.world import World, connected, use_cpu


def connect_accelerate() -> tuple[Accelerator, World]:
    """Join the group that the launcher started.

    `Accelerator()` on a machine without a GPU would make two separate trainings of two processes; with
    `cpu=True` they are one gloo group. Its own mixed precision stays off: autocast is the root module's.
    """
    accelerator = Accelerator(
        cpu=use_cpu(),
        mixed_precision="no",
        # The root module runs every head on every rank, and we average the buffers once per step ourselves.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    world = connected(
        accelerator.num_processes,
        accelerator.process_index,
        accelerator.local_process_index,
        accelerator.device,
    )
    return accelerator, world


class AccelerateEngine(Engine):
    """`root` on one device, or wrapped by DDP: gradients are averaged over the ranks."""

    def __init__(
        self, accelerator: Accelerator, world: World, root: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.world = world
        self.root = root
        self.optimizer = optimizer
        self._accelerator = accelerator
        self._wrapped = accelerator.prepare_model(root) if world.size > 1 else root
        self._names = {parameter: name for name, parameter in root.named_parameters()}

    def forward_backward(self, *inputs: Any, last: bool) -> None:
        silent = self._wrapped.no_sync() if self.world.size > 1 and not last else nullcontext()
        with silent:
            self._wrapped(*inputs).backward()

    def step(self, absent: Iterable[nn.Parameter], clip_norm: float | None) -> StepResult:
        average_buffers(self.root, self.world)
        for parameter in absent:
            # An optimizer passes over a parameter without a gradient: no weight decay, no momentum.
            parameter.grad = None
        parameters = [parameter for parameter in self._names if parameter.grad is not None]
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=grad_norm)

    def full_state(self) -> FullState:
        if not self.world.is_main:
            return FullState(model={}, optimizer={})
        optimizer = {
            f"{slot}/{self._names[parameter]}": host_copy(value)
            for parameter, slots in self.optimizer.state.items()
            for slot, value in slots.items()
            if isinstance(value, Tensor)
        }
        return FullState(
            model={name: host_copy(tensor) for name, tensor in self.root.state_dict().items()},
            optimizer=optimizer,
        )

    def load_full_state(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        self.root.load_state_dict(dict(model))
        parameters = {name: parameter for parameter, name in self._names.items()}
        self.optimizer.state.clear()
        for key, value in optimizer.items():
            slot, name = key.split("/", 1)
            parameter = parameters[name]
            # Step counters stay on the host, as torch's optimizers keep them (unless fused).
            device = torch.device("cpu") if value.ndim == 0 else parameter.device
            self.optimizer.state[parameter][slot] = value.to(device, copy=True)
