"""A model in words."""

from __future__ import annotations

import torch

from mtl_dist.models.building import build_model
from mtl_dist.models.describe import parameters_in_words
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import HeadSpec


def model(**settings: object) -> MultitaskModel:
    heads = [HeadSpec("kind", "vector", 3), HeadSpec("age", "vector", 1)]
    return build_model(ModelSettings.model_validate({"backbone": "simple_cnn", **settings}), heads, 1, (8, 8))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_what_is_frozen_is_named_and_what_trains_is_counted() -> None:
    plain = model()
    assert parameters_in_words(plain) == f"{count(plain):,} parameters"
    frozen = model(frozen=True)
    trains = count(frozen.heads)
    assert parameters_in_words(frozen) == (
        f"{count(frozen):,} parameters, of which {trains:,} train; frozen: backbone"
    )
    frozen.heads["age"].requires_grad_(False)
    trains = count(frozen.heads["kind"])
    assert parameters_in_words(frozen).endswith(f"of which {trains:,} train; frozen: backbone, heads.age")


def test_separate_backbones_are_one_part_when_all_are_frozen() -> None:
    assert parameters_in_words(model(sharing="separate", frozen=True)).endswith("frozen: backbones")
