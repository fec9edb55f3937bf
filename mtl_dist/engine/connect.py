"""Which engine a run uses: what its launcher says, or else its recipe; and the way in to either."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mtl_dist.engine import deepspeed_keys
from mtl_dist.engine.engine import Engine
from mtl_dist.engine.launcher import Launcher
from mtl_dist.engine.precision import build_scaler, set_tf32
from mtl_dist.engine.rank_environment import check_slurm_step
from mtl_dist.engine.settings import EngineSettings, Precision, ZeroStage
from mtl_dist.engine.world import World, join_group, launched_size, leave, own_device
from mtl_dist.errors import UserError

DEFAULT_STAGE: ZeroStage = 2
"""As `accelerate launch --use_deepspeed` has it."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine that settings and launcher agree on, and what it can do.

    Whoever works differently with one engine than with another asks for a capability, never for its name:

        shards_parameters     between the steps a rank holds only its shards of the weights
        has_whole_gradients   every rank holds the whole gradient after the backward
        divides_updates       a rank updates a part of the parameters, as numbers in a row
    """

    kind: Literal["accelerate", "deepspeed"]
    zero_stage: ZeroStage = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's own configuration, of recipe or launcher."""

    WHOLE_PARAMETERS: ClassVar[str] = "engine.zero_stage to 2"
    """What to set where whole weights are wanted."""

    @property
    def shards_parameters(self) -> bool:
        return self.zero_stage == 3

    @property
    def has_whole_gradients(self) -> bool:
        return self.zero_stage == 0

    @property
    def divides_updates(self) -> bool:
        return self.zero_stage > 0

    @property
    def name(self) -> str:
        """As in `ZeRO 2`."""
        return "accelerate" if self.kind == "accelerate" else f"ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Connection:
    """A group of ranks, joined, and how a model is wrapped for it.

    `build(root, optimizer, parts)` takes the root module and an optimizer over its parameters; `parts` are
    those of each task alone, which are absent together. Whole weights are gone from `root` after it under
    ZeRO 3, so whatever wants to see them (a summary) comes before.
    """

    world: World
    choice: EngineChoice
    build: Callable[[nn.Module, torch.optim.Optimizer, Iterable[Sequence[nn.Parameter]]], Engine]

    def describe(self) -> str:
        """The engine in words, for the log."""
        ranks = "one process" if self.world.size == 1 else f"{self.world.size} ranks"
        if self.choice.kind == "accelerate":
            return ranks if self.world.size == 1 else f"DDP on {ranks}"
        words = f"DeepSpeed {self.choice.name} on {ranks}"
        offloaded = [
            name
            for name, wanted in (
                ("optimizer", self.choice.offload_optimizer),
                ("weights", self.choice.offload_parameters),
            )
            if wanted
        ]
        if offloaded:
            words += f", {' and '.join(offloaded)} in host memory"
        if self.world.size == 1 and self.choice.zero_stage > 0:
            words += ": there is nobody to share with, so it saves no memory"
        return words

    def close(self) -> None:
        """Leave the group. Nothing collective can follow."""
        leave()


def connect(settings: EngineSettings, precision: Precision) -> Connection:
    """Join the group that the launcher started.

    Raises:
        UserError: the launcher and the recipe say different things, or the launcher wants what we do not do.
    """
    choice = choose(settings, os.environ)
    check_slurm_step(os.environ)
    set_tf32(settings.tf32)
    if choice.kind == "deepspeed":
        return _connect_deepspeed(choice, precision)
    return _connect_accelerate(choice, precision)


def connect_without_engine(settings: EngineSettings, device: torch.device | str | None = None) -> World:
    """Join the group that the launcher started, for evaluation and prediction; or, on a `device`, nobody.

    No engine wraps anything there: every rank holds whole weights, so whatever launcher and recipe say of one
    does not matter. A process alone joins nothing and leaves nothing behind.

    Raises:
        UserError: this machine has no such device.
    """
    set_tf32(settings.tf32)
    if device is not None:
        return World(rank=0, size=1, local_rank=0, device=_existing(device))
    if launched_size() > 1:
        return join_group()
    return World(rank=0, size=1, local_rank=0, device=own_device(0))


def _existing(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f'device: expected one of this machine, such as "cpu" or "cuda:0", found {str(name)!r}: {first}'
        ) from None
    return device


def _connect_accelerate(choice: EngineChoice, precision: Precision) -> Connection:
    from mtl_dist.engine.accelerated import AccelerateEngine, connect_accelerate

    accelerator, world = connect_accelerate()

    def build(
        root: nn.Module, optimizer: torch.optim.Optimizer, parts: Iterable[Sequence[nn.Parameter]]
    ) -> Engine:
        return AccelerateEngine(accelerator, world, root.to(world.device), optimizer, build_scaler(precision))

    return Connection(world, choice, build)


def _connect_deepspeed(choice: EngineChoice, precision: Precision) -> Connection:
    from mtl_dist.engine.deepspeed_engine import build_deepspeed_engine

    world = join_group()
    on_gpus = deepspeed_keys.gpu_keys(choice.deepspeed)
    if on_gpus and world.device.type == "cpu":
        raise UserError(f"engine.deepspeed: expected GPUs for {', '.join(on_gpus)}, found CPUs. Remove it.")

    def build(
        root: nn.Module, optimizer: torch.optim.Optimizer, parts: Iterable[Sequence[nn.Parameter]]
    ) -> Engine:
        return build_deepspeed_engine(
            world,
            root.to(world.device),
            optimizer,
            build_scaler(precision),
            parts,
            stage=choice.zero_stage,
            offload_optimizer=choice.offload_optimizer,
            offload_parameters=choice.offload_parameters,
            given=choice.deepspeed,
        )

    return Connection(world, choice, build)


# ------------------------------------------------------------------ who says what
def choose(settings: EngineSettings, environment: Mapping[str, str]) -> EngineChoice:
    """The engine that recipe and launcher agree on; `environment` is what the launcher has set.

    Raises:
        UserError: one line per contradiction.
    """
    launcher = Launcher(environment)
    problems = launcher.problems()
    kind = settings.kind
    of_deepspeed = [
        name
        for name, asked in (
            ("zero_stage", settings.zero_stage is not None),
            ("offload_optimizer", settings.offload_optimizer),
            ("offload_parameters", settings.offload_parameters),
            ("deepspeed", bool(settings.deepspeed)),
        )
        if asked
    ]
    if kind == "auto":
        kind = "deepspeed" if launcher.deepspeed or of_deepspeed else "accelerate"
    if kind == "accelerate":
        if launcher.deepspeed:
            problems.append(
                "engine.kind: expected deepspeed, which `accelerate launch` was given, found accelerate. "
                "Start without --use_deepspeed, or remove engine.kind."
            )
        problems += [
            f"engine.{name}: expected no value under engine.kind accelerate. Remove one of them."
            for name in of_deepspeed
        ]
        if problems:
            raise UserError("\n".join(problems))
        return EngineChoice("accelerate")
    if settings.deepspeed and launcher.config:
        problems.append(
            "engine.deepspeed: expected no value beside --deepspeed_config_file, found one. "
            "Remove one of them."
        )
    config = settings.deepspeed or launcher.config
    said, asked_stage = launcher.zero_stage, settings.zero_stage
    in_recipe = deepspeed_keys.said(settings.deepspeed).get("engine.zero_stage")
    if in_recipe is not None and asked_stage not in (None, in_recipe):
        problems.append(
            f"engine.zero_stage: expected {in_recipe}, as engine.deepspeed has it, found {asked_stage}. "
            "Remove one of them."
        )
    asked_stage = asked_stage if asked_stage is not None else in_recipe
    if said is not None and asked_stage is not None and said != asked_stage:
        problems.append(
            f"engine.zero_stage: expected {said}, which `accelerate launch` was given, found {asked_stage}. "
            "Remove one of them."
        )
    stage = asked_stage if asked_stage is not None else said if said is not None else DEFAULT_STAGE
    offload_optimizer = settings.offload_optimizer or launcher.offloads("optimizer")
    offload_parameters = settings.offload_parameters or launcher.offloads("param")
    offload_optimizer |= deepspeed_keys.offloads(config, "optimizer")
    offload_parameters |= deepspeed_keys.offloads(config, "param")
    if offload_optimizer and stage == 0:
        problems.append("engine.offload_optimizer: expected zero_stage 1, 2 or 3, found 0. Raise the stage.")
    if offload_parameters and stage != 3:
        problems.append(f"engine.offload_parameters: expected zero_stage 3, found {stage}. Raise the stage.")
    if problems:
        raise UserError("\n".join(problems))
    return EngineChoice("deepspeed", stage, offload_optimizer, offload_parameters, config)
