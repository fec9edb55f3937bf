"""Heads and decoders: sizes, settings per task, and what each head reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtl_dist.config.loading import load_settings
from mtl_dist.errors import UserError
from mtl_dist.models.backbones import build_network
from mtl_dist.models.decoders.unet import UNetDecoder, plan_decoder
from mtl_dist.models.heads import Head, VectorHead, build_head, check_heads, chosen_decoder, wanted_maps
from mtl_dist.models.settings import (
    DecoderSettings,
    HeadSettings,
    ModelSettings,
    TaskHeadSettings,
    UserHeadSettings,
)
from mtl_dist.specs import HeadSpec

RESNET18 = {2: 64, 4: 64, 8: 128, 16: 256, 32: 512}
MASK = HeadSpec("mask", "map", 2)
KIND = HeadSpec("kind", "vector", 3)


def loaded(tmp_path: Path, data: dict[str, Any]) -> ModelSettings:
    (tmp_path / "model.yaml").write_text(json.dumps(data))
    return load_settings(ModelSettings, tmp_path / "model.yaml")


def head_of(settings: ModelSettings, spec: HeadSpec, size: int = 32) -> Head:
    network = build_network(settings, 3, (size, size))
    return build_head(settings, spec, network.channels, network.vector_size, "vector")


def features_of(channels: dict[int, int], height: int, width: int) -> dict[str, torch.Tensor]:
    return {f"stride_{s}": torch.randn(2, c, -(-height // s), -(-width // s)) for s, c in channels.items()}


def test_a_vector_head_without_hidden_layers_is_linear() -> None:
    head = VectorHead("vector", 5, HeadSettings(), 3)
    x = torch.randn(4, 5)
    assert torch.equal(head({"vector": x}, (8, 8)), head.output(x))


def test_hidden_layers_and_dropout_follow_the_settings() -> None:
    head = VectorHead("vector", 8, HeadSettings(hidden=(512, 256), dropout=0.3), 3)
    assert [layer.out_features for layer in head.hidden] == [512, 256]  # type: ignore[union-attr]
    x = torch.randn(4, 8)
    assert not torch.equal(head({"vector": x}, (8, 8)), head({"vector": x}, (8, 8)))
    head.eval()
    assert torch.equal(head({"vector": x}, (8, 8)), head({"vector": x}, (8, 8)))


def test_a_vector_head_over_a_map_takes_its_mean() -> None:
    head = VectorHead("stride_32", 4, HeadSettings(), 3)
    map_BDHW = torch.randn(2, 4, 3, 5)
    expected = head.output(map_BDHW.mean(dim=(2, 3)))
    assert torch.equal(head({"stride_32": map_BDHW}, (96, 160)), expected)


@pytest.mark.parametrize(("output_stride", "expected"), [(1, (70, 90)), (2, (35, 45))])
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("channels", [None, (512, 256, 128, 64), (32, 16)])
def test_a_decoder_reaches_the_output_size_even_an_odd_one(
    output_stride: int, expected: tuple[int, int], skips: bool, channels: tuple[int, ...] | None
) -> None:
    settings = DecoderSettings(channels=channels, skips=skips, output_stride=output_stride)  # type: ignore[arg-type]
    plan = plan_decoder(settings, RESNET18, "mask")
    decoder = UNetDecoder(plan, output_stride, "group", 2)
    assert decoder(features_of(RESNET18, 70, 90), (70, 90)).shape == (2, 2, *expected)
    assert plan.strides == ({32} if not skips else {32, 16, 8, 4, 2} if channels != (32, 16) else {32, 16, 8})


def test_the_given_channels_are_the_levels() -> None:
    plan = plan_decoder(DecoderSettings(channels=(512, 256, 128, 64)), RESNET18, "mask")
    assert [(level.stride, level.channels, level.skip_channels) for level in plan.levels] == [
        (16, 512, 256),
        (8, 256, 128),
        (4, 128, 64),
        (2, 64, 64),
    ]
    convolutions = [m for m in UNetDecoder(plan, 1, "batch", 2).modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions[:2]] == [(512 + 256, 512), (512, 512)]


@pytest.mark.parametrize(
    ("channels", "output_stride", "expected"),
    [
        (RESNET18, 1, (256, 128, 64, 32)),
        ({32: 2048, 16: 1024}, 1, (512, 256, 128, 64)),
        ({16: 768}, 2, (256, 128, 64)),
        ({1: 32, 2: 64, 4: 64}, 1, (32, 16)),
        ({1: 32, 2: 64, 4: 64}, 2, (32,)),
    ],
)
def test_default_channels_follow_from_the_stages(
    channels: dict[int, int], output_stride: int, expected: tuple[int, ...]
) -> None:
    settings = DecoderSettings(output_stride=output_stride)  # type: ignore[arg-type]
    assert tuple(level.channels for level in plan_decoder(settings, channels, "m").levels) == expected


def test_too_many_levels_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"\(task mask\): expected at most 4 levels, from stride 32 to stride 2, found 5"
    ):
        plan_decoder(DecoderSettings(channels=(9, 8, 7, 6, 5), output_stride=2), RESNET18, "mask")


def test_a_task_changes_only_what_it_names() -> None:
    settings = ModelSettings(
        head=HeadSettings(hidden=(16,), dropout=0.3),
        decoder=DecoderSettings(skips=False),
        heads={"kind": TaskHeadSettings(dropout=0.0), "mask": TaskHeadSettings(channels=(8, 4))},
    )
    network = build_network(settings, 3, (32, 32))
    kind = head_of(settings, KIND)
    assert isinstance(kind, VectorHead)
    assert kind.dropout.p == 0.0
    assert len(kind.hidden) == 1
    assert wanted_maps(settings, MASK, network.channels).strides == {32}
    mask = head_of(settings, MASK)
    assert isinstance(mask, UNetDecoder)
    assert [level.channels for level in mask.plan.levels] == [8, 4]


def test_a_task_can_go_back_to_a_linear_head() -> None:
    settings = ModelSettings(head=HeadSettings(hidden=(16,)), heads={"kind": TaskHeadSettings(hidden=())})
    head = head_of(settings, KIND)
    assert isinstance(head, VectorHead)
    assert len(head.hidden) == 0


def test_the_recipe_of_a_run_which_states_all_options_of_a_head_is_read_again() -> None:
    own = {"kind": TaskHeadSettings(hidden=(3,)), "mask": TaskHeadSettings(skips=False)}
    stated = ModelSettings.model_validate_json(ModelSettings(heads=own).model_dump_json())
    assert "hidden" in stated.heads["mask"].model_fields_set
    check_heads(stated, [KIND, MASK])


def test_unknown_tasks_and_options_of_others_are_one_line_each() -> None:
    settings = ModelSettings(
        heads={
            "msk": TaskHeadSettings(skips=False),
            "kind": TaskHeadSettings(skips=False, hidden=(3,)),
            "mask": TaskHeadSettings(hidden=(3,)),
        }
    )
    with pytest.raises(UserError) as caught:
        check_heads(settings, [KIND, MASK])
    assert str(caught.value).splitlines() == [
        "model.heads.msk: expected one of the tasks kind, mask, found 'msk'. Correct the name or remove it.",
        "model.heads.kind.skips: expected an option of a vector head (hidden, dropout), found 'skips'. "
        "Remove it.",
        "model.heads.mask.hidden: expected an option of a map head (kind, channels, skips, output_stride, "
        "norm), found 'hidden'. Remove it.",
    ]


@pytest.mark.parametrize(
    ("model_norm", "own", "expected"),
    [
        ("batch", None, nn.BatchNorm2d),
        ("sync", None, nn.BatchNorm2d),
        ("group", None, nn.GroupNorm),
        ("frozen", None, nn.GroupNorm),
        ("batch", "group", nn.GroupNorm),
        ("group", "batch", nn.BatchNorm2d),
    ],
)
def test_a_decoder_normalises_as_the_model_does_unless_it_says_otherwise(
    model_norm: str, own: str | None, expected: type[nn.Module]
) -> None:
    settings = ModelSettings(norm=model_norm, decoder=DecoderSettings(norm=own))  # type: ignore[arg-type]
    decoder = head_of(settings, MASK)
    assert any(isinstance(module, expected) for module in decoder.modules())
    norms = (nn.BatchNorm2d, nn.GroupNorm)
    assert all(isinstance(module, expected) for module in decoder.modules() if isinstance(module, norms))


@pytest.mark.parametrize("kind", ["fpn", "linear"])
@pytest.mark.parametrize("size", [(64, 64), (70, 90), (33, 47)])
def test_every_decoder_gives_a_map_of_the_image_size_even_an_odd_one(
    kind: str, size: tuple[int, int], tmp_path: Path
) -> None:
    settings = loaded(tmp_path, {"decoder": {"kind": kind}})
    head = head_of(settings, MASK, 64)
    assert head(features_of(RESNET18, *size), size).shape == (2, 2, *size)


def test_a_decoder_keeps_its_short_name_and_states_its_arguments(tmp_path: Path) -> None:
    settings = loaded(tmp_path, {"decoder": {"kind": "fpn", "width": 32}})
    assert settings.model_dump(mode="json")["decoder"] == {
        "kind": "fpn",
        "pyramid_channels": 256,
        "width": 32,
        "dropout": 0.0,
    }


def test_a_task_may_have_another_decoder_than_the_others(tmp_path: Path) -> None:
    settings = loaded(tmp_path, {"decoder": {"kind": "fpn"}, "heads": {"mask": {"kind": "linear"}}})
    assert isinstance(chosen_decoder(settings, "mask"), UserHeadSettings)
    assert chosen_decoder(settings, "mask").path.endswith("LinearDecoder")  # type: ignore[union-attr]
    assert chosen_decoder(settings, "other").path.endswith("FPNDecoder")  # type: ignore[union-attr]
    settings = loaded(tmp_path, {"decoder": "fpn", "heads": {"mask": {"kind": "unet", "skips": False}}})
    check_heads(settings, [MASK])
    assert chosen_decoder(settings, "mask") == DecoderSettings(skips=False)
    assert chosen_decoder(settings, "other").path.endswith("FPNDecoder")  # type: ignore[union-attr]


def test_a_decoder_may_stand_by_its_bare_name(tmp_path: Path) -> None:
    assert loaded(tmp_path, {"decoder": "unet", "heads": {"mask": "unet"}}).decoder == DecoderSettings()
    for stated in ({"decoder": "unett"}, {"heads": {"mask": "unett"}}):
        with pytest.raises(UserError, match=r'expected unet, fpn, .*found "unett"\. Did you mean unet\?'):
            loaded(tmp_path, stated)
    with pytest.raises(UserError, match=r"adapter: expected a mapping .*Write \{kind: lora\}"):
        loaded(tmp_path, {"adapter": "lora"})


def test_options_of_the_unet_on_another_decoder_are_refused(tmp_path: Path) -> None:
    settings = loaded(tmp_path, {"decoder": {"kind": "linear"}, "heads": {"mask": {"skips": False}}})
    with pytest.raises(UserError, match=r"model\.heads\.mask: expected a decoder of its own .*\(skips\)"):
        check_heads(settings, [MASK])


def test_a_misspelt_decoder_is_told_the_others(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r'decoder\.kind: expected unet, found "fpm"\. Others are fpn, linear, upernet, '
    ):
        loaded(tmp_path, {"decoder": {"kind": "fpm"}})
    with pytest.raises(UserError, match=r"Did you mean upernet\?"):
        loaded(tmp_path, {"decoder": {"kind": "upernett"}})
