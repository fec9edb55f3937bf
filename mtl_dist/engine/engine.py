"""The engine protocol: what a training step asks of whatever wraps the model.

One forward of the root module returns one scalar, the loss sums behind it and the outputs, and the engine
sees exactly one backward per micro-batch. Everything else (losses, balancing, autocast) happens inside the
root module, so it is the same under every engine.

An engine may keep only a *shard* of each weight on a rank (`shards_parameters`). Whoever reads weights
outside a training step does so inside `evaluating()`, or works on the shards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.batch import Outputs
from mtl_dist.engine.precision import LossScaler
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    grad_norm   before clipping
    finite      bool, whether the gradient was: if not, the step was skipped by all ranks. It lies on the host
                where the host knows it, else on the device, and reading it waits for the step
    overflowed  whether fp16's loss scale is why it was not, which the scaler has answered
    """

    grad_norm: Tensor
    finite: Tensor
    overflowed: bool = False

    @property
    def skipped(self) -> bool:
        """Whether the step was skipped; on a GPU this waits for it."""
        return not self.finite


@dataclass
class FullState:
    """The engine-independent state of a model and its optimizer, in float32 on the host of rank 0.

    `optimizer` names each tensor `<slot>/<parameter name>` (`exp_avg/model.heads.digit.weight`); step
    counters are among them (`step/...`). On the other ranks both are empty. `scaler` is the loss scaler's
    state, on every rank; empty without one.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scaler: dict[str, float] = field(default_factory=dict)


class Engine(ABC):
    """Wraps one root module and its optimizer for all ranks.

    `scaler` is there under fp16 only. Whoever works differently with one engine than with another asks for a
    capability:

        shards_parameters    between the steps a rank holds only its shards of the weights
    """

    world: World
    root: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScaler | None
    shards_parameters: bool = False
    _losses_finite: Tensor | None = None
    """Under fp16: whether the window's losses are, on this rank so far."""

    @abstractmethod
    def forward_backward(self, *inputs: Any, last: bool) -> tuple[Tensor, Outputs]:
        """One forward of the root module, which returns (scalar, sums, outputs), and one backward of the
        scalar.

        Returns the sums and the outputs. `last` marks the window's last micro-batch, after which gradients
        are averaged over the ranks.
        """

    @abstractmethod
    def step(self, absent: Iterable[nn.Parameter], clip_norm: float | None) -> StepResult:
        """One optimizer step on the window's gradients, which are cleared.

        Their norm costs one more pass over them; it is what tells that they are finite.

        The `absent` parameters belong to tasks without any label in the window: they and their optimizer
        state stay exactly as they are. So does everything where a gradient is not finite.

        Raises:
            UserError: no loss scale of fp16 makes the gradients finite.
        """

    @abstractmethod
    def full_state(self) -> FullState:
        """Collective: a host copy of the whole state, on rank 0.

        Raises:
            UserError: a weight is not finite.
        """

    @abstractmethod
    def load_full_state(
        self,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        scaler: Mapping[str, float] | None = None,
    ) -> None:
        """Collective: take over a full state; every rank passes the same. Without `scaler` its own stays."""

    def _tell_scaler(self, finite: bool) -> bool:
        """Collective where it is not: tell fp16's scaler whether the gradient was finite, with its scale.

        Returns whether the scale is why it was not: a loss that is not finite is none of its doing.

        Raises:
            UserError: no scale helps.
        """
        losses_finite, self._losses_finite = self._losses_finite, None
        if self.scaler is None:
            return False
        if not finite:
            bad_loss = torch.tensor(float(losses_finite is not None and not losses_finite))
            if self.world.max(bad_loss):
                return False
        self.scaler.update(finite)
        return not finite

    def _watch(self, sums: Tensor) -> None:
        """Note whether this window's losses are finite, where the loss scale is judged by it."""
        if self.scaler is not None:
            finite = sums.isfinite().all()
            self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite

    def evaluating(self) -> AbstractContextManager[None]:
        """Collective: inside, every rank's `root` holds all its weights and may be called directly."""
        return nullcontext()

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Collective: inside, these parameters hold all their weights, also within the root's forward."""
        return nullcontext()

    def shards(self) -> dict[str, Tensor]:
        """This rank's part of every trainable weight, as it is now; writing to it changes the weight.

        Whatever is element-wise (an average over the steps) can be kept for the shards alone.
        """
        return {name: p.detach() for name, p in self.root.named_parameters() if p.requires_grad}

    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of `whole`, a tensor of the weight `name`'s shape."""
        return whole

    def gathered(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collective: the whole tensors of `shards`, on the host of rank 0; elsewhere empty."""
        return {name: host_copy(shard) for name, shard in shards.items()} if self.world.is_main else {}


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


def require_same_names(root: nn.Module, model: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `model` has exactly the weights and buffers of `root`."""
    odd = sorted(root.state_dict().keys() ^ model.keys())
    if odd:
        listing = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise UserError(
            f"checkpoint: expected the weights of this model, found other ones ({listing}). "
            "Load it with the recipe that it was trained with."
        )


def require_finite(shards: Mapping[str, Tensor], world: World) -> None:
    """Collective: raise UserError if a weight is not finite, before it is saved; `shards` are this rank's.

    Asked here, not at every step: the host waits for the GPU.
    """
    held = [shard for shard in shards.values() if shard.numel()]
    lost = bool(held) and not torch.stack(torch._foreach_norm(held, torch.inf)).isfinite().all()
    if world.max(torch.tensor(float(lost))):
        raise UserError(
            "train: expected finite weights, found inf or NaN, which are not saved. Lower optim.lr, or set "
            "optim.clip_norm; the last checkpoint is whole."
        )


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that later steps do not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()


_NUMBERS: dict[str, type] = {"int": int, "float": float, "bool": bool}


def stored_slots(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state of one parameter as named tensors: a plain number `n` is `n:int` or `n:float`, an
    absent value `n:none`."""
    slots: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            slots[name] = value
        elif value is None:
            slots[f"{name}:none"] = torch.zeros(())
        elif type(value).__name__ in _NUMBERS:
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            slots[f"{name}:{type(value).__name__}"] = torch.tensor(value, dtype=dtype)
        else:
            raise UserError(
                f"optim.kind: expected state of tensors and numbers, found {name}, a {type(value).__name__}."
            )
    return slots


def put_slot(state: dict[str, Any], slot: str, value: Tensor) -> None:
    """Put a stored slot back as it was."""
    name, _, kind = slot.partition(":")
    if not kind:
        state[name] = value
    else:
        state[name] = None if kind == "none" else _NUMBERS[kind](value.item())


def counter_device(group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    """Where an optimizer keeps its step counters: on the host, unless it runs on the GPU altogether."""
    on_device = group.get("fused") or group.get("capturable")
    return parameter.device if on_device else torch.device("cpu")
