"""The DeepSpeed engine: ZeRO 0, 1, 2 and 3 around the root module, with our own torch optimizer.

DeepSpeed is asked for the partitioning and its communication only. Autocast, the loss scale, accumulation,
the clipping norm, schedules and checkpoints are ours, so that they mean the same under every engine.

ZeRO flattens the parameters of a group into one tensor and divides it over the ranks. A group here never
holds parameters of two tasks, so an absent task is absent as whole flat tensors: their gradients are hidden
from the optimizer, and weights, momentum and step counters stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.batch import Outputs
from mtl_dist.engine.deepspeed_setup import deepspeed_config, import_deepspeed
from mtl_dist.engine.engine import (
    Engine,
    FullState,
    StepResult,
    average_buffers,
    host_copy,
    put_slot,
    require_finite,
    require_same_names,
    stored_slots,
)
from mtl_dist.engine.partitions import gather, interleaved_layout, scatter
from mtl_dist.engine.precision import LossScaler
from mtl_dist.engine.replicated import ReplicatedEngine
from mtl_dist.engine.settings import ZeroStage
from mtl_dist.engine.world import World
from mtl_dist.engine.zero_groups import (
    FlatGroup,
    partitioned_groups,
    separate_groups,
    sharded_groups,
)
from mtl_dist.errors import UserError


def build_deepspeed_engine(
    world: World,
    root: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler | None,
    parts: Iterable[Sequence[nn.Parameter]],
    *,
    stage: ZeroStage,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Engine:
    """`root` under DeepSpeed.

    `parts` are the parameters that are absent together, those of each task; `given` is a configuration of
    DeepSpeed's, of which it gets what docs/deepspeed.md says.
    """
    deepspeed = import_deepspeed()
    separate_groups(optimizer, parts)
    names = {parameter: name for name, parameter in root.named_parameters()}
    config = deepspeed_config(root, stage, offload_optimizer, offload_parameters, world.device, given or {})
    # It sends the weights of rank 0 to all, and can send contiguous ones of some dimension only.
    scalars = [name for parameter, name in names.items() if parameter.ndim == 0]
    if scalars:
        raise UserError(
            f"engine: DeepSpeed expects parameters of at least one dimension, found {', '.join(scalars)} "
            "without. Make them vectors of one element."
        )
    for parameter in root.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    wrapped, zero, _, _ = deepspeed.initialize(
        model=root, optimizer=optimizer, config=config, dist_init_required=False
    )
    if stage == 0:
        return _ReplicatedZero(world, root, optimizer, scaler, wrapped)
    if stage == 3:
        groups = sharded_groups(zero, names, world)
        return _ShardedZero(world, root, optimizer, scaler, wrapped, groups)
    groups = partitioned_groups(zero, names, world)
    return _PartitionedZero(world, root, optimizer, scaler, wrapped, groups)


class _ReplicatedZero(ReplicatedEngine):
    """ZeRO 0: DeepSpeed averages the gradients; every rank holds and updates everything."""

    def __init__(
        self,
        world: World,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None,
        wrapped: Any,
    ) -> None:
        super().__init__(world, root, optimizer, scaler)
        self._deepspeed = wrapped

    def forward_backward(self, *inputs: Any, last: bool) -> tuple[Tensor, Outputs]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        scalar, sums, outputs = self._deepspeed(*inputs)
        self._deepspeed.backward(scalar if self.scaler is None else scalar * self.scaler.scale)
        self._watch(sums)
        return sums, outputs

    def step(self, absent: Iterable[nn.Parameter], clip_norm: float | None) -> StepResult:
        return self._update(absent, clip_norm)


class _Zero(Engine):
    """What ZeRO 1, 2 and 3 have in common: the optimizer sees flat groups, divided over the ranks."""

    def __init__(
        self,
        world: World,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None,
        wrapped: Any,
        groups: list[FlatGroup],
    ) -> None:
        self.world = world
        self.root = root
        self.optimizer = optimizer
        self.scaler = scaler
        self._deepspeed = wrapped
        self._groups = groups
        self._absent: set[Tensor] = set()
        self._hidden: dict[Tensor, Tensor | None] = {}
        optimizer.register_step_pre_hook(self._hide_absent)
        optimizer.register_step_post_hook(self._show_absent)

    # ------------------------------------------------------------------ a step
    def forward_backward(self, *inputs: Any, last: bool) -> tuple[Tensor, Outputs]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        if self.scaler is not None:
            # Its backward multiplies with this, its step divides by it.
            self._deepspeed.optimizer.override_loss_scale(self.scaler.scale)
        scalar, sums, outputs = self._deepspeed(*inputs)
        self._deepspeed.backward(scalar)
        self._watch(sums)
        return sums, outputs

    def step(self, absent: Iterable[nn.Parameter], clip_norm: float | None) -> StepResult:
        average_buffers(self.root, self.world)
        away = set(absent)
        self._absent = {group.flat for group in self._groups if group.parameters[0] in away}
        self._deepspeed.optimizer.clip_grad = clip_norm or 0.0
        self._deepspeed.step()
        finite = self._deepspeed.was_step_applied()
        overflowed = self._tell_scaler(finite)
        grad_norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32)
        return StepResult(grad_norm, torch.tensor(finite), overflowed)

    def _hide_absent(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer passes over a tensor without a gradient: no weight decay, no momentum."""
        flats = {flat for group in optimizer.param_groups for flat in group["params"]}
        self._hidden = {flat: flat.grad for flat in flats & self._absent}
        for flat in self._hidden:
            flat.grad = None

    def _show_absent(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # With the optimizer on the host, DeepSpeed keeps the gradients' buffers.
        for flat, gradient in self._hidden.items():
            flat.grad = gradient

    # ------------------------------------------------------------------ state
    def full_state(self) -> FullState:
        require_finite(self._held(), self.world)
        scaler = self.scaler.state_dict() if self.scaler is not None else {}
        optimizer: dict[str, Tensor] = {}
        for group in self._groups:
            for slot, value in stored_slots(self.optimizer.state.get(group.flat, {})).items():
                optimizer |= self._whole_slot(group, slot, value)
        return FullState(model=self._whole_model(), optimizer=optimizer, scaler=scaler)

    def _whole_slot(self, group: FlatGroup, slot: str, value: Tensor) -> dict[str, Tensor]:
        """Collective: one slot of a group by parameter, on rank 0."""
        if value.ndim == 0:
            # A counter, the same for the whole group.
            return {f"{slot}/{name}": host_copy(value) for name in group.shapes if self.world.is_main}
        whole = {
            name: torch.empty(shape, dtype=value.dtype)
            for name, shape in group.shapes.items()
            if self.world.is_main
        }
        gather(value, group.layout, whole, self.world)
        return {f"{slot}/{name}": tensor for name, tensor in whole.items()}

    def load_full_state(
        self,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        scaler: Mapping[str, float] | None = None,
    ) -> None:
        require_same_names(self.root, model)
        self._load_model(model)
        slots: dict[str, dict[str, Tensor]] = {}
        for key, value in optimizer.items():
            slot, name = key.split("/", 1)
            slots.setdefault(slot, {})[name] = value
        self.optimizer.state.clear()
        for group in self._groups:
            scatter(group.flat, group.layout[self.world.rank], model)
            for slot, values in slots.items():
                self._load_slot(group, slot, values)
        if scaler and self.scaler is not None:
            self.scaler.load_state_dict(scaler)

    def _load_slot(self, group: FlatGroup, slot: str, values: Mapping[str, Tensor]) -> None:
        present = [values[name] for name in group.shapes if name in values]
        if not present:
            # Absent since the start: the optimizer has not seen the group yet.
            return
        if len(present) < len(group.shapes) or (
            present[0].ndim == 0 and len({float(v) for v in present}) > 1
        ):
            raise UserError(
                f"checkpoint: expected equally many optimizer steps of {', '.join(group.shapes)}, which ZeRO "
                "keeps together, found different ones. Go on without ZeRO, or start again from its weights."
            )
        if present[0].ndim == 0:
            counter = present[0].to(group.counter_device, copy=True)
            put_slot(self.optimizer.state[group.flat], slot, counter)
            return
        shard = torch.empty_like(group.flat, dtype=present[0].dtype, requires_grad=False)
        scatter(shard, group.layout[self.world.rank], values)
        self.optimizer.state[group.flat][slot] = shard

    def _held(self) -> dict[str, Tensor]:
        """The weights that this rank holds: its shards without what only fills them up."""
        return self.shards()

    @abstractmethod
    def _whole_model(self) -> dict[str, Tensor]:
        """Collective: weights and buffers, on the host of rank 0; elsewhere empty."""

    @abstractmethod
    def _load_model(self, model: Mapping[str, Tensor]) -> None:
        """Collective: take over weights and buffers."""


class _PartitionedZero(_Zero):
    """ZeRO 1 and 2: the weights are whole on every rank."""

    def _whole_model(self) -> dict[str, Tensor]:
        if not self.world.is_main:
            return {}
        return {name: host_copy(tensor) for name, tensor in self.root.state_dict().items()}

    def _load_model(self, model: Mapping[str, Tensor]) -> None:
        self.root.load_state_dict(dict(model))


class _ShardedZero(_Zero):
    """ZeRO 3: every rank holds an equal part of every weight, and whole ones only while a module runs."""

    shards_parameters = True
    _all_whole = False

    def shards(self) -> dict[str, Tensor]:
        return {name: p.ds_tensor.data for name, p in self._parameters().items() if p.requires_grad}

    def _held(self) -> dict[str, Tensor]:
        # DeepSpeed never writes what fills up the last shard: it may be anything, NaN too.
        parameters = self._parameters()
        held = {}
        for name, shard in self.shards().items():
            segments = self._layout(name, parameters[name].ds_numel)[self.world.rank]
            held[name] = shard.view(-1)[: sum(segment.length for segment in segments)]
        return held

    def shard_of(self, name: str, whole: Tensor) -> Tensor:
        shard = torch.empty_like(self._parameters()[name].ds_tensor.data)
        scatter(shard, self._layout(name, whole.numel())[self.world.rank], {name: whole})
        return shard

    def gathered(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, shard in shards.items():
            whole |= self._gathered(name, shard)
        return whole

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        # Small weights stay whole between steps; after a change of the shards they would be old.
        self._deepspeed.empty_partition_cache()
        with unwrap_model_for_generation(self._deepspeed):
            self._all_whole = True
            try:
                yield
            finally:
                self._all_whole = False

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        from deepspeed.runtime.zero import GatheredParameters

        gathered: AbstractContextManager[None] = GatheredParameters(parameters, enabled=not self._all_whole)
        return gathered

    def _whole_model(self) -> dict[str, Tensor]:
        parameters = self._parameters()
        model: dict[str, Tensor] = {}
        # `state_dict` has the names, in order, and the buffers; its weights are empty here.
        for name, tensor in self.root.state_dict().items():
            if name in parameters:
                model |= self._gathered(name, parameters[name].ds_tensor)
            elif self.world.is_main:
                model[name] = host_copy(tensor)
        return model

    def _load_model(self, model: Mapping[str, Tensor]) -> None:
        self._deepspeed.empty_partition_cache()
        parameters = self._parameters()
        for name, tensor in self.root.state_dict().items():
            if name in parameters:
                layout = self._layout(name, parameters[name].ds_numel)
                scatter(parameters[name].ds_tensor.data, layout[self.world.rank], model)
            else:
                tensor.copy_(model[name])

    def _gathered(self, name: str, shard: Tensor) -> dict[str, Tensor]:
        """Collective: the whole tensor of which each rank has a shard, on rank 0; elsewhere empty."""
        parameter: Any = self._parameters()[name]
        whole = {name: torch.empty(parameter.ds_shape, dtype=shard.dtype)} if self.world.is_main else {}
        gather(shard, self._layout(name, parameter.ds_numel), whole, self.world)
        return whole

    def _parameters(self) -> dict[str, Any]:
        """By name; DeepSpeed has given them `ds_tensor` (the shard), `ds_shape` and `ds_numel`."""
        return dict(self.root.named_parameters(remove_duplicate=False))

    def _layout(self, name: str, size: int) -> Any:
        return interleaved_layout({name: size}, self.world.size)
