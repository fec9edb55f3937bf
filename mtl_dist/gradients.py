"""What balancing on gradients works with: every task's own gradient, before the one backward of the engine.

`torch.autograd.grad` reads gradients without reaching the parameters' `.grad`, so neither DDP's reducer nor
ZeRO's hooks notice. Across ranks (W of them):

- at the *features*, where the shared part meets the heads, G is a sum over samples, hence over ranks: only
  T x T numbers travel;
- at the shared *parameters*, the gradients are averaged over the ranks first, each rank keeping one W-th of
  them, and the products of these shards are summed. (The mean of local Gramians would be wrong: noise
  inflates its diagonal.)

Shapes: T tasks, B samples, P shared parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtl_dist.balance.method import Level
from mtl_dist.engine.world import World

# torch has renamed it.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

COLUMNS_IN_CACHE = 16384
"""Of a (T, P) matrix; anything from 4,096 to 65,536 is about as fast."""


class GradientScale:
    """What multiplies each task's gradient where it leaves the features for the shared part.

    `scale_T` (None: nothing is multiplied) may change until the backward. Where `closed`, nothing comes
    through, and autograd does not even compute the shared part's backward.
    """

    def __init__(self) -> None:
        self.scale_T: Tensor | None = None
        self.closed = False

    def applied(self, features: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
        """The same features, whose gradients from this task will be multiplied."""
        return {name: _Scaled.apply(feature, self, task) for name, feature in features.items()}


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, feature: Tensor, scale: GradientScale, task: int
    ) -> Tensor:
        ctx.scale, ctx.task = scale, task  # type: ignore[attr-defined]
        return feature.view_as(feature)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor | None, None, None]:
        scale, task = ctx.scale, ctx.task  # type: ignore[attr-defined]
        if scale.closed:
            return None, None, None
        if scale.scale_T is None:
            return gradient, None, None
        # The product in float32: a factor rounded to bfloat16 would be off by 2^-9.
        return (gradient.float() * scale.scale_T[task]).to(gradient.dtype), None, None


class _Injection(torch.autograd.Function):
    """The scalar as it is; in the backward its gradient, times the given ones, goes to the parameters."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        scalar: Tensor,
        gradients: Sequence[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.gradients = gradients  # type: ignore[attr-defined]
        return scalar.view_as(scalar)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, *(gradient * own for own in ctx.gradients)  # type: ignore[attr-defined]


def with_gradient(scalar: Tensor, parameters: Sequence[nn.Parameter], gradient_P: Tensor) -> Tensor:
    """`scalar`, whose backward also adds `gradient_P` (times its own gradient) to the parameters'."""
    shaped = [part.to(p.dtype) for p, part in zip(parameters, parts_of(gradient_P, parameters), strict=True)]
    injected: Tensor = _Injection.apply(scalar, shaped, *parameters)
    return injected


def parts_of(flat_P: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Views of a flat tensor, one per parameter, in the parameter's own memory order (channels-last)."""
    segments = flat_P.split([p.numel() for p in parameters])
    return [segment.as_strided(p.size(), p.stride()) for p, segment in zip(parameters, segments, strict=True)]


@contextmanager
def without_side_effects(module: nn.Module, device: torch.device) -> Iterator[None]:
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


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32: its 10 bits cannot tell a cosine of 0.999 from 1, and the solvers work on such differences."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


class JacobianMemory:
    """Where the tasks' gradients of the shared parameters lie, (T, P) in float32: the same in every window.

    On a CPU fresh memory costs more than what is written to it (the system clears every page); a GPU's
    allocator hands the same memory out again by itself, and may use it for other things in between.
    """

    def __init__(self) -> None:
        self._kept_TP: Tensor | None = None

    def take(self, num_tasks: int, size: int, device: torch.device) -> Tensor:
        """Uninitialised memory; what was taken before must no longer be in use."""
        kept_TP = self._kept_TP
        if kept_TP is None or kept_TP.shape != (num_tasks, size) or kept_TP.device != device:
            kept_TP = torch.empty(num_tasks, size, device=device)
        if device.type == "cpu":
            self._kept_TP = kept_TP
        return kept_TP


def products(rows_TP: Tensor) -> Tensor:
    """The products of all pairs of rows, (T, T)."""
    if rows_TP.device.type != "cpu":
        return rows_TP @ rows_TP.T
    # As one product of so flat a matrix it takes three times as long: its pieces fit the cache.
    products_TT = rows_TP.new_zeros(len(rows_TP), len(rows_TP))
    for piece_TC in rows_TP.split(COLUMNS_IN_CACHE, dim=1):
        products_TT.addmm_(piece_TC, piece_TC.T)
    return products_TT


@dataclass(frozen=True)
class WindowSums:
    """What all ranks found in a window.

    losses_T       each task's mean loss over the labels of the whole window
    gramian_TT     G = J J^T of these losses; None where it was not asked for
    comparable_TT  which tasks have a sample of the window and a feature in common, bool: at the features, the
                   gradients of any other two are at right angles, whatever the tasks want
    """

    losses_T: Tensor
    gramian_TT: Tensor | None = None
    comparable_TT: Tensor | None = None


class WindowGradients:
    """Gathers the losses and gradients of a window's micro-batches, then sums them over all ranks.

    `losses_T` given to `add_...` are this rank's part, scaled so that their mean over ranks is the global
    loss (see step.py). Rows of absent tasks stay 0. The backward runs on losses times `scale` (fp16's
    smallest gradients would be 0 otherwise); all results are without it.
    """

    def __init__(
        self, num_tasks: int, world: World, scale: float = 1.0, memory: JacobianMemory | None = None
    ) -> None:
        self._world = world
        self._memory = memory or JacobianMemory()
        self._scale = scale
        self._losses_T = torch.zeros(num_tasks, device=world.device)
        self._gramian_TT = torch.zeros(num_tasks, num_tasks, device=world.device)
        self._common_TT = torch.zeros(num_tasks, num_tasks, device=world.device)
        self._jacobian_TP: Tensor | None = None
        self._jacobian_scale = scale

    def add_losses(self, losses_T: Tensor) -> None:
        self._losses_T += losses_T.detach()

    def add_at_features(
        self,
        losses_T: Tensor,
        features: Sequence[Mapping[str, Tensor]],
        present_T: Sequence[bool],
        labelled_TB: Tensor,
    ) -> None:
        """Add the products of the tasks' gradients at the features, `features[k]` those that task k reads."""
        rows: dict[str, dict[int, Tensor]] = {}
        for k, present in enumerate(present_T):
            if present:
                found = torch.autograd.grad(
                    losses_T[k] * self._scale,
                    list(features[k].values()),
                    retain_graph=True,
                    allow_unused=True,
                )
                for name, gradient in zip(features[k], found, strict=True):
                    if gradient is not None:  # a head may leave a map that it is given
                        rows.setdefault(name, {})[k] = gradient.float().flatten()
        with full_float32():
            for gradients in rows.values():
                tasks = torch.tensor(list(gradients), device=self._world.device)
                rows_TN = torch.stack(list(gradients.values())).div_(self._scale)
                at = (tasks[:, None], tasks[None, :])
                self._gramian_TT[at] += products(rows_TN)
                labelled = labelled_TB[tasks].float()
                self._common_TT[at] += labelled @ labelled.T

    def add_at_parameters(
        self, losses_T: Tensor, parameters: Sequence[nn.Parameter], present_T: Sequence[bool]
    ) -> None:
        """Add the tasks' gradients of the shared parameters."""
        first = self._jacobian_TP is None
        if self._jacobian_TP is None:
            size = sum(p.numel() for p in parameters)
            self._jacobian_TP = self._memory.take(len(present_T), size, self._world.device)
        for row_P, loss, present in zip(self._jacobian_TP, losses_T, present_T, strict=True):
            if not present:
                row_P.zero_()
                continue
            found = torch.autograd.grad(
                loss * self._scale, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            parts = parts_of(row_P, parameters)
            # One pass over memory: with few samples per step that is what all this costs.
            if first:
                torch._foreach_copy_(parts, found)
            else:
                torch._foreach_add_(parts, [gradient.to(row_P.dtype) for gradient in found])

    def over_ranks(self, level: Level | None) -> WindowSums:
        """Collective: the window's losses, and at a `level` the Gramian; both travel together."""
        losses_T, size = self._losses_T, self._world.size
        if level is None:
            return WindowSums(self._mean(losses_T))
        if level == "features":
            # Each rank's losses carry the factor W that DDP's mean takes out again; G has it twice.
            losses_T, gramian_TT, common_TT = self._summed(losses_T, self._gramian_TT, self._common_TT)
            return WindowSums(losses_T / size, gramian_TT / size**2, common_TT > 0)
        shard_TS = self._averaged_shard(self.local_jacobian)
        with full_float32():
            losses_T, gramian_TT = self._summed(losses_T, products(shard_TS))
        return WindowSums(losses_T / size, gramian_TT, torch.ones_like(gramian_TT, dtype=torch.bool))

    def _summed(self, *parts: Tensor) -> list[Tensor]:
        """The sums over ranks of several small tensors, in one exchange."""
        flat = self._world.device_sum(torch.cat([part.flatten() for part in parts]))
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    @property
    def local_jacobian(self) -> Tensor:
        """This rank's gradients (T, P), whose mean over the ranks is J."""
        assert self._jacobian_TP is not None
        if self._jacobian_scale != 1:
            self._jacobian_TP /= self._jacobian_scale
            self._jacobian_scale = 1.0
        return self._jacobian_TP

    def global_jacobian(self) -> Tensor:
        """Collective: J (T, P), averaged over the ranks."""
        return self._mean(self.local_jacobian)

    def _averaged_shard(self, jacobian_TP: Tensor) -> Tensor:
        """This rank's columns of the averaged J: each row travels once, in W pieces."""
        size = self._world.size
        if size == 1:
            return jacobian_TP
        padding = -jacobian_TP.shape[1] % size
        shards = []
        for row_P in jacobian_TP:
            padded_P = nn.functional.pad(row_P, (0, padding))
            shard_S = padded_P.new_empty(padded_P.numel() // size)
            _reduce_scatter(shard_S, padded_P)
            shards.append(shard_S / size)
        return torch.stack(shards)

    def _mean(self, values: Tensor) -> Tensor:
        if self._world.size == 1:
            return values  # J is large: no copy of it.
        return self._world.device_sum(values) / self._world.size
