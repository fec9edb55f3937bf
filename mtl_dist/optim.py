"""Optimizers, their parameter groups, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from mtl_dist.config.errors import suggest
from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.user_optimizer import build_user_optimizer, complete_arguments, is_elementwise, optimizer_class

if TYPE_CHECKING:
    from torch import nn

    from mtl_dist.models.multitask import MultitaskModel

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class LearningRateSchedule(ABC):
    """A schedule of the user's: a pure function, so that a resumed run goes on where it stopped."""

    @abstractmethod
    def factor(self, progress: float, epoch: int) -> float:
        """What multiplies every learning rate in this epoch, this fraction of the steps being done."""


class UserScheduleSettings(UserDefinedSettings):
    """A schedule of the user's."""

    part_base = "mtl_dist.optim.LearningRateSchedule"

    def factor(self, progress: float, epoch: int) -> float:
        value = float(self.make().factor(progress, epoch))
        if not 0 <= value < math.inf:
            raise UserError(
                f"optim.schedule: expected a factor >= 0 of {self.path}, found {value:g} at "
                f"{progress:.3f} of the run."
            )
        return value


class ConstantSchedule(Settings):
    """The learning rate stays."""

    kind: Literal["constant"] = "constant"

    def factor(self, progress: float, epoch: int) -> float:
        return 1.0


class CosineSchedule(Settings):
    """Half a cosine from the learning rate down to `final` times it, over the whole run."""

    kind: Literal["cosine"] = "cosine"
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    def factor(self, progress: float, epoch: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class StepSchedule(Settings):
    """Multiply by `gamma` every `every` epochs."""

    kind: Literal["step"] = "step"
    every: Annotated[int, Field(ge=1)] = 10
    gamma: Positive = 0.1

    def factor(self, progress: float, epoch: int) -> float:
        return self.gamma ** (epoch // self.every)


class OneCycleSchedule(Settings):
    """Smith's one-cycle policy (https://arxiv.org/abs/1708.07120), of the rate alone: cosine from
    lr / `start_div` up to lr in the first `peak` of the run, then down to lr / `final_div`."""

    kind: Literal["one_cycle"] = "one_cycle"
    peak: Annotated[float, Field(gt=0, lt=1)] = 0.3
    start_div: Positive = 25.0
    final_div: Positive = 1e4

    def factor(self, progress: float, epoch: int) -> float:
        if progress < self.peak:
            low, high, part = 1 / self.start_div, 1.0, progress / self.peak
        else:
            low, high, part = 1.0, 1 / self.final_div, (progress - self.peak) / (1 - self.peak)
        return high + (low - high) * 0.5 * (1 + math.cos(math.pi * part))


class PlateauSchedule(Settings):
    """Multiply by `gamma` when the monitored metric has not improved for `patience` evaluations.

    The factor of the moment is state of the run (`Monitor` counts the evaluations), not of this class.
    """

    kind: Literal["plateau"] = "plateau"
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.5
    patience: Annotated[int, Field(ge=0)] = 3
    minimum: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    """The smallest factor."""

    def factor(self, progress: float, epoch: int) -> float:
        return 1.0


Schedule = Annotated[
    ConstantSchedule | CosineSchedule | StepSchedule | OneCycleSchedule | PlateauSchedule,
    Field(discriminator="kind"),
    UserDefined((UserScheduleSettings,)),
]

BUILT_IN = ("adamw", "adam", "sgd")


class OptimSettings(Settings):
    """How weights are updated."""

    kind: str = "adamw"
    """adamw, adam, sgd, or the import path of an optimizer of torch.optim or of the user's."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict, validate_default=True)
    """What the constructor of an optimizer by import path takes besides learning rate and weight decay."""
    lr: Positive = 1e-3
    """The learning rate, before warm-up and schedule."""
    backbone_lr: Positive | None = None
    """The shared part's own learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What multiplies the backbone's rate once for each layer below its last one."""
    task_lr: dict[str, Positive] = Field(default_factory=dict)
    """Learning rates of single tasks' own parts (head, separate backbone)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """What shrinks the weights: decoupled from the gradient in adamw, added to it in adam and sgd."""
    decay_norms: bool = False
    """Whether weight decay also acts on biases and normalisation scales (parameters of one dimension)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of adamw and adam: how slowly the averages of gradients and of their squares move."""
    eps: Positive = 1e-8
    """Of adamw and adam: what is added to the divisor."""
    momentum: Fraction = 0.9
    """Of sgd."""
    nesterov: bool = False
    """Of sgd: whether its momentum is Nesterov's."""
    clip_norm: Positive | None = None
    """Largest gradient norm over all parameters; null: no clipping."""
    schedule: Schedule = CosineSchedule()
    """How the learning rate moves over the run."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up, multiplied with the schedule."""
    ema: Fraction | None = None
    """Decay of an exponential moving average of the weights, which then is what gets evaluated."""

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind in BUILT_IN:
            return kind
        if "." not in kind:
            raise ValueError(f"expected a known optimizer or an import path, found {kind}. {_advice(kind)}")
        optimizer_class(kind)
        return kind

    @field_validator("arguments")
    @classmethod
    def _all_of_them(cls, arguments: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        """They are stated in full, as the settings of the package's own optimizers are."""
        kind = info.data.get("kind", "adamw")
        if kind not in BUILT_IN:
            return complete_arguments(kind, arguments)
        if arguments:
            raise ValueError(
                f"expected none with {kind}, which has settings of its own, found some. Remove them."
            )
        return arguments

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> OptimSettings:
        for name in (*_OF_ADAM, *_OF_SGD):
            default, value = type(self).model_fields[name].default, getattr(self, name)
            if value != default and name not in _USED.get(self.kind, ()):
                advice = "Remove it" if self.kind in BUILT_IN else "Move it to optim.arguments"
                raise ValueError(f"{name}: expected none with {self.kind}, found {value}. {advice}.")
        return self

    @property
    def is_elementwise(self) -> bool:
        """Whether an element of a parameter is updated for itself, so that ranks can divide a parameter."""
        return self.kind in BUILT_IN or is_elementwise(self.kind, self.arguments)


_OF_ADAM, _OF_SGD = ("betas", "eps"), ("momentum", "nesterov")
_USED = {"adamw": _OF_ADAM, "adam": _OF_ADAM, "sgd": _OF_SGD}


def _advice(kind: str) -> str:
    return suggest(kind, [*BUILT_IN, "torch.optim.NAdam"])


def build_optimizer(
    settings: OptimSettings, model: MultitaskModel, tasks: list[str], extra: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, grouped by learning rate and weight decay.

    Each group carries `base_lr`, which `set_learning_rate` multiplies. `extra` (a balancer's own parameters)
    gets `lr` and no weight decay.

    Raises:
        UserError: `task_lr` names an unknown task, or nothing is trainable.
    """
    for name in settings.task_lr:
        if name not in tasks:
            raise UserError(f"optim.task_lr.{name}: expected one of the tasks {', '.join(tasks)}.")
    in_backbones = {p for backbone in model.all_backbones() for p in backbone.parameters()}
    shared = model.shared_parameters()
    parts = [
        (
            "backbone",
            settings.backbone_lr or settings.lr,
            [p for p in shared if p in in_backbones or not in_backbones],
        ),
        ("sharing", settings.lr, [p for p in shared if in_backbones and p not in in_backbones]),
    ]
    parts += [(task, settings.task_lr.get(task, settings.lr), model.task_parameters(task)) for task in tasks]
    factors = model.lr_factors()
    if settings.layer_decay < 1:
        layers = model.backbone_layers()
        if not layers:
            raise UserError(
                "optim.layer_decay: expected a model of backbone and heads, found model.network, "
                "whose layers nobody knows. Remove it."
            )
        factors |= _layer_factors(layers, settings.layer_decay)
    parts = [part for whole in parts for part in _by_rate(*whole, factors)]
    undecayed = model.undecayed_parameters()
    groups = []
    for name, lr, parameters in parts:
        trainable = [p for p in parameters if p.requires_grad]
        plain = [p for p in trainable if not settings.decay_norms and (p.ndim <= 1 or p in undecayed)]
        decayed = [p for p in trainable if settings.decay_norms or (p.ndim > 1 and p not in undecayed)]
        groups += [_group(name, lr, settings.weight_decay, decayed), _group(name, lr, 0.0, plain)]
    groups.append(_group("balance", settings.lr, 0.0, extra))
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("model: nothing is trainable. Unfreeze the backbone or add a task with a head.")
    if settings.kind not in BUILT_IN:
        return build_user_optimizer(settings.kind, settings.arguments, groups)
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov)
    adam = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    # The fused kernel takes a third of the time. On a CPU it reads memory end to end: a gradient must lie
    # as its weight does (channels-last or not), which autograd and DDP see to.
    return adam(groups, betas=settings.betas, eps=settings.eps, fused=True)


def _layer_factors(
    layers: Sequence[Sequence[Sequence[nn.Parameter]]], decay: float
) -> dict[nn.Parameter, float]:
    """What multiplies the rate of each layer of each backbone: the last one's by 1."""
    return {
        parameter: decay ** (len(backbone) - 1 - number)
        for backbone in layers
        for number, layer in enumerate(backbone)
        for parameter in layer
    }


def _by_rate(
    name: str, lr: float, parameters: list[nn.Parameter], factors: Mapping[nn.Parameter, float]
) -> list[tuple[str, float, list[nn.Parameter]]]:
    """A part divided by what multiplies its rate, the whole rate at the end."""
    rates = sorted({factors.get(p, 1.0) for p in parameters}, key=lambda rate: (rate == 1.0, rate))
    return [(name, lr * rate, [p for p in parameters if factors.get(p, 1.0) == rate]) for rate in rates]


def _group(name: str, lr: float, weight_decay: float, parameters: list[nn.Parameter]) -> dict[str, object]:
    return {"params": parameters, "name": name, "base_lr": lr, "lr": lr, "weight_decay": weight_decay}


def learning_rate_factor(
    settings: OptimSettings, step: int, total_steps: int, epoch: int, plateau: float
) -> float:
    """What multiplies every base learning rate at optimizer step `step` (counted from 0)."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    return warmup * plateau * settings.schedule.factor(step / max(1, total_steps), epoch)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current rate of each part (backbone, tasks), for the log."""
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
