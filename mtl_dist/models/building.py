"""A model out of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from mtl_dist.errors import UserError
from mtl_dist.models.adapters import add_adapters
from mtl_dist.models.backbones import published_normalisation
from mtl_dist.models.blueprint import Blueprint
from mtl_dist.models.heads import check_heads
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.norms import convert_norms
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.sharing.hard import Hard
from mtl_dist.models.sharing.separate import Separate
from mtl_dist.specs import HeadSpec

Measured: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel."""


def build_model(
    settings: ModelSettings,
    heads: Sequence[HeadSpec],
    in_channels: int,
    image_size: tuple[int, int],
    *,
    measured: Measured | None = None,
    is_picture: bool = True,
) -> MultitaskModel:
    """The model for these heads and images, in training mode, on the CPU.

    `measured` are mean and deviation of the training images, `is_picture` whether these are 8-bit RGB.

    Untrained weights are drawn from torch's global generator: seed it first.

    Raises:
        UserError: settings that don't fit the tasks, the backbone or the images.
    """
    if not heads:
        raise UserError("tasks: expected at least one task, found none. Give the model something to learn.")
    check_heads(settings, heads)
    mean, std = normalisation(settings, in_channels, measured, is_picture)
    specs = {spec.task: spec for spec in heads}
    blueprint = Blueprint(settings, specs, in_channels, image_size, mean, std)
    own = settings.user_sharing
    if settings.adapter is not None and settings.adapter.per_task:
        model: MultitaskModel = Separate(blueprint)
    else:
        model = Hard(blueprint) if own is None else own.make(blueprint=blueprint)
    if settings.adapter is not None:
        add_adapters(model, settings, image_size)
    elif settings.frozen:
        model.freeze_backbones()
    if settings.norm == "sync":
        convert_norms(model, "sync")
    return model.train()


def normalisation(
    settings: ModelSettings, in_channels: int, measured: Measured | None, is_picture: bool
) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel, as `model.normalise` and what stands beside it say.

    Raises:
        UserError: they want what was not measured, or do not fit the channels.
    """
    mean, std = published_normalisation(settings.backbone_name, in_channels)
    if settings.normalise == "data" and measured is None:
        raise UserError(
            "model.normalise: expected auto or published for data whose pixels were not measured, found "
            "data. Prepare it again, or state model.mean and model.std."
        )
    if measured is not None and (
        settings.normalise == "data" or (settings.normalise == "auto" and not is_picture)
    ):
        mean = list(measured[0])
        std = [deviation or 1.0 for deviation in measured[1]]  # a channel of one value becomes 0
    return (
        _per_channel("mean", settings.mean, mean, in_channels),
        _per_channel("std", settings.std, std, in_channels),
    )


def _per_channel(
    name: str, given: tuple[float, ...] | None, default: list[float], in_channels: int
) -> list[float]:
    if given is None:
        return default
    if len(given) not in (1, in_channels):
        raise UserError(
            f"model.{name}: expected 1 value or {in_channels}, one per channel, found {len(given)}. "
            "Correct the list."
        )
    return list(given) * (in_channels // len(given))
