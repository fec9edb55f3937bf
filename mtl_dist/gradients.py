"""What gradient balancing looks at: every task's own gradient, before the one backward of the engine.

`torch.autograd.grad` reads gradients without reaching the parameters' `.grad`, so neither DDP's reducer nor
ZeRO's hooks notice. Across ranks (W of them):

- at the *features*, where the shared part meets the heads, G is a sum over samples, hence over ranks: only
  T x T numbers travel;
- at the shared *parameters*, the gradients are averaged over the ranks first, each rank keeping one W-th of
  them, and the products of these shards are summed. (The mean of local Gramians would be wrong: noise
  inflates its diagonal.)

Shapes: T tasks, P shared parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtl_dist.balance.balancer import Level
from mtl_dist.engine.world import World


class _Gate(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number that may still change before the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, feature: Tensor, gate: Tensor) -> Tensor:
        ctx.gate = gate  # type: ignore[attr-defined]
        return feature.view_as(feature)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.gate.to(gradient.dtype), None  # type: ignore[attr-defined]


def gated(features: Mapping[str, Tensor], gate: Tensor) -> dict[str, Tensor]:
    """`features` whose gradients will be multiplied by the scalar tensor `gate`, as it is in the backward."""
    return {name: _Gate.apply(feature, gate) for name, feature in features.items()}


@contextmanager
def as_if_unseen(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A forward in here leaves no trace: random state and BatchNorm's running statistics stay."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    counters = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    for layer in layers:
        layer.momentum = 0.0
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for counter, count in zip(counters, counts, strict=True):
            counter.copy_(count)


class WindowGradients:
    """Gathers the losses and gradients of a window's micro-batches, then speaks for all ranks.

    `losses_T` given to `add` are this rank's share, scaled so that their mean over ranks is the global loss
    (see step.py). Rows of absent tasks stay 0.
    """

    def __init__(self, num_tasks: int, world: World) -> None:
        self._world = world
        self._losses_T = torch.zeros(num_tasks, device=world.device)
        self._gramian_TT = torch.zeros(num_tasks, num_tasks, device=world.device)
        self._jacobian_TP: Tensor | None = None

    def add_losses(self, losses_T: Tensor) -> None:
        self._losses_T += losses_T.detach()

    def add_at_features(
        self, losses_T: Tensor, features: Sequence[Mapping[str, Tensor]], present_T: Sequence[bool]
    ) -> None:
        """Add the products of the tasks' gradients at the features, `features[k]` those that task k reads."""
        gradients: dict[int, dict[str, Tensor]] = {}
        for k, present in enumerate(present_T):
            if present:
                found = torch.autograd.grad(losses_T[k], list(features[k].values()), retain_graph=True)
                gradients[k] = dict(zip(features[k], (g.float().flatten() for g in found), strict=True))
        for j, first in gradients.items():
            for k, second in gradients.items():
                if j <= k:
                    common = [first[name] @ second[name] for name in first if name in second]
                    if common:
                        self._gramian_TT[j, k] += torch.stack(common).sum()

    def add_at_parameters(
        self, losses_T: Tensor, parameters: Sequence[nn.Parameter], present_T: Sequence[bool]
    ) -> None:
        """Add the tasks' gradients of the shared parameters."""
        if self._jacobian_TP is None:
            size = sum(p.numel() for p in parameters)
            self._jacobian_TP = torch.zeros(len(present_T), size, device=self._world.device)
        for k, present in enumerate(present_T):
            if not present:
                continue
            found = torch.autograd.grad(
                losses_T[k], parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            self._jacobian_TP[k] += torch.cat([g.float().flatten() for g in found])

    def global_losses(self) -> Tensor:
        """Collective: the mean of each task's loss over the labels of the whole window, (T,)."""
        return self._mean(self._losses_T)

    def global_gramian(self, level: Level) -> Tensor:
        """Collective: G = J J^T of the global losses, (T, T)."""
        if level == "features":
            # Each rank's losses carry the factor W that DDP's mean takes out again; G has it twice.
            upper_TT = self._world.device_sum(self._gramian_TT) / self._world.size**2
            return upper_TT.triu() + upper_TT.triu(1).T
        assert self._jacobian_TP is not None
        shard_TS = self._averaged_shard(self._jacobian_TP)
        return self._world.device_sum(shard_TS @ shard_TS.T)

    def global_jacobian(self) -> Tensor:
        """Collective: J (T, P), averaged over the ranks."""
        assert self._jacobian_TP is not None
        return self._mean(self._jacobian_TP)

    def _averaged_shard(self, jacobian_TP: Tensor) -> Tensor:
        """This rank's columns of the averaged J: each row travels once, in W pieces."""
        size = self._world.size
        if size == 1:
            return jacobian_TP
        padding = -jacobian_TP.shape[1] % size
        padded_TP = nn.functional.pad(jacobian_TP, (0, padding))
        shards = []
        for row_P in padded_TP:
            shard_S = row_P.new_empty(row_P.numel() // size)
            dist.reduce_scatter_tensor(shard_S, row_P)
            shards.append(shard_S / size)
        return torch.stack(shards)

    def _mean(self, values: Tensor) -> Tensor:
        return self._world.device_sum(values) / self._world.size
