"""What engines have in common that keep whole weights, gradients and optimizer state on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mtl_dist.engine.engine import (
    Engine,
    FullState,
    StepResult,
    average_buffers,
    counter_device,
    host_copy,
    put_slot,
    require_finite,
    require_same_names,
    stored_slots,
)
from mtl_dist.engine.precision import LossScaler
from mtl_dist.engine.world import World


class ReplicatedEngine(Engine):
    """An engine whose backward leaves the averaged gradient of every parameter on every rank."""

    def __init__(
        self, world: World, root: nn.Module, optimizer: torch.optim.Optimizer, scaler: LossScaler | None
    ) -> None:
        self.world = world
        self.root = root
        self.optimizer = optimizer
        self.scaler = scaler
        self._names: dict[Tensor, str] = {p: name for name, p in root.named_parameters()}
        # Whether a step is skipped on the device: asking there would make the host wait for a GPU at every
        # step, which fp16's scale needs anyway. Optimizers with fused kernels can.
        can_skip = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._gates_on_device = world.device.type == "cuda" and scaler is None and can_skip

    def _update(self, absent: Iterable[nn.Parameter], clip_norm: float | None) -> StepResult:
        """One optimizer step on `parameter.grad`, which is cleared."""
        average_buffers(self.root, self.world)
        for parameter in absent:
            # An optimizer passes over a parameter without a gradient: no weight decay, no momentum.
            parameter.grad = None
        parameters = [parameter for parameter in self._names if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        finite = grad_norm.isfinite()
        if not self._gates_on_device:
            finite = finite.cpu()
        if self.scaler is not None:
            torch._foreach_mul_(gradients, 1 / self.scaler.scale)
            grad_norm = grad_norm / self.scaler.scale if finite else torch.full_like(grad_norm, torch.inf)
        overflowed = self.scaler is not None and self._tell_scaler(bool(finite))
        if self._gates_on_device or finite:
            if clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip_norm, grad_norm)
            if self._gates_on_device:
                # What torch's own gradient scaler tells it: its kernel then leaves everything as it is.
                self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, finite, overflowed)

    def full_state(self) -> FullState:
        require_finite(self.shards(), self.world)
        scaler = self.scaler.state_dict() if self.scaler is not None else {}
        if not self.world.is_main:
            return FullState(model={}, optimizer={}, scaler=scaler)
        optimizer = {
            f"{slot}/{self._names[parameter]}": host_copy(value)
            for parameter, slots in self.optimizer.state.items()
            for slot, value in stored_slots(slots).items()
        }
        model = {name: host_copy(tensor) for name, tensor in self.root.state_dict().items()}
        return FullState(model=model, optimizer=optimizer, scaler=scaler)

    @torch.no_grad()
    def load_full_state(
        self,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        scaler: Mapping[str, float] | None = None,
    ) -> None:
        require_same_names(self.root, model)
        self.root.load_state_dict(dict(model))
        parameters = {name: parameter for parameter, name in self._names.items()}
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        self.optimizer.state.clear()
        for key, value in optimizer.items():
            slot, name = key.split("/", 1)
            parameter = parameters[name]
            if value.ndim == 0:
                own = value.to(counter_device(groups[parameter], parameter), copy=True)
            elif value.shape == parameter.shape:
                # In the weight's own memory format (channels-last), as the optimizer made it.
                own = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                own = value.to(parameter.device, copy=True)
            put_slot(self.optimizer.state[parameter], slot, own)
        if scaler and self.scaler is not None:
            self.scaler.load_state_dict(scaler)
