"""The engine protocol: what a training step asks of whatever wraps the model.

One forward of the root module returns one scalar, and the engine sees exactly one backward per micro-batch.
Everything else (losses, balancing, autocast) happens inside the root module, so it is the same under every
engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.engine.world import World


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the gradient norm before clipping, and whether the step was skipped
    because a gradient was not finite (fp16 only)."""

    grad_norm: Tensor
    skipped: bool = False


@dataclass
class FullState:
    """The engine-independent state of a model and its optimizer, in float32 on the host of rank 0.

    `optimizer` names each tensor `<slot>/<parameter name>` (`exp_avg/model.heads.digit.weight`). On the
    other ranks both are empty.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Engine(ABC):
    """Wraps one root module and its optimizer for all ranks."""

    world: World
    root: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def forward_backward(self, *inputs: Any, last: bool) -> None:
        """One forward of the root module and one backward of the scalar it returns.

        `last` marks the window's last micro-batch, after which gradients are summed over the ranks.
        """

    @abstractmethod
    def step(self, absent: Iterable[nn.Parameter], clip_norm: float | None) -> StepResult:
        """One optimizer step on the window's gradients, which are cleared.

        The `absent` parameters belong to tasks without any label in the window: they and their optimizer
        state stay exactly as they are.
        """

    @abstractmethod
    def full_state(self) -> FullState:
        """Collective: a host copy of the whole state, on rank 0."""

    @abstractmethod
    def load_full_state(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Collective: take over a full state; every rank passes the same tensors."""


def average_buffers(root: nn.Module, world: World) -> None:
    """Make floating-point buffers (BatchNorm's running statistics) the mean over all ranks.

    Done once per step, so that every rank evaluates with, and a checkpoint holds, the statistics of the whole
    global batch, and so that resuming does not depend on when the ranks last agreed.
    """
    if world.size == 1:
        return
    buffers = [buffer for name, buffer in root.named_buffers() if is_running_statistic(name)]
    if not buffers:
        return
    flat = torch._utils._flatten_dense_tensors(buffers)
    torch.distributed.all_reduce(flat)
    flat /= world.size
    for buffer, mean in zip(buffers, torch._utils._unflatten_dense_tensors(flat, buffers), strict=True):
        buffer.copy_(mean)


def is_running_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that later steps do not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()
