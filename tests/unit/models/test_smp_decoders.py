"""Decoders of segmentation-models-pytorch over our maps: sizes, gradients, norms, what is computed again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_dist.caveats import remarks
from mtl_dist.config.loading import load_settings
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.decoders.deeplabv3plus import DeepLabV3PlusDecoder
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import HeadSpec
from tests.unit.models.test_checkpointing import saved_bytes, state_after_two_steps

pytest.importorskip("segmentation_models_pytorch")

VECTOR, MASK, DEPTH = HeadSpec("kind", "vector", 3), HeadSpec("mask", "map", 2), HeadSpec("depth", "map", 1)
VIT, CNN = "timm/test_vit", "timm/test_resnet"
SMALL: dict[str, dict[str, Any]] = {
    "unet": {},
    "fpn": {"width": 16, "pyramid_channels": 16},
    "linear": {},
    "upernet": {"width": 16},
    "deeplabv3plus": {"width": 16, "atrous_rates": [1, 2, 3]},
    "segformer": {"width": 16},
    "dpt": {"width": 16, "widths": [8, 8, 8, 8]},
}
OF_THE_LIBRARY = ["upernet", "deeplabv3plus", "segformer", "dpt"]


def settings(folder: Path, kind: str, backbone: str = CNN, **more: Any) -> ModelSettings:
    own = more.pop("decoder", {})
    data = {"backbone": backbone, "decoder": {"kind": kind, **SMALL[kind], **own}, **more}
    (folder / "model.yaml").write_text(json.dumps(data))
    return load_settings(ModelSettings, folder / "model.yaml")


def model(
    folder: Path, kind: str, backbone: str = CNN, size: tuple[int, int] = (32, 32), **more: Any
) -> MultitaskModel:
    torch.manual_seed(0)
    return build_model(settings(folder, kind, backbone, **more), [VECTOR, MASK, DEPTH], 3, size)


def backbone_of(kind: str) -> str:
    return VIT if kind == "dpt" else CNN


def check_sizes_and_gradients(own: MultitaskModel, size: tuple[int, int]) -> None:
    outputs = own(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
    assert outputs["mask"].shape == (2, 2, *size)
    assert outputs["depth"].shape == (2, 1, *size)
    torch.stack([output.square().mean() for output in outputs.values()]).sum().backward()
    idle = [name for name, p in own.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    tasks = {parameter for task in outputs for parameter in own.task_parameters(task)}
    assert tasks | set(own.shared_parameters()) == set(own.parameters())


def test_deeplab_wants_two_maps() -> None:
    with pytest.raises(UserError, match="two strides or more for deeplabv3plus, found one with stride 32"):
        DeepLabV3PlusDecoder.used_strides({32: 768})


@pytest.mark.parametrize("size", [(33, 47), (65, 64)])
@pytest.mark.parametrize("backbone", [CNN, VIT])
@pytest.mark.parametrize("kind", OF_THE_LIBRARY)
def test_maps_have_the_size_of_odd_images_and_every_parameter_a_gradient(
    kind: str, backbone: str, size: tuple[int, int], tmp_path: Path
) -> None:
    if kind != "dpt" or backbone == VIT:
        check_sizes_and_gradients(model(tmp_path, kind, backbone, size), size)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("size", [(33, 47), (65, 64)])
@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "mobilenet_v3_small",
        "convnext_tiny",
        "swin_t",
        "simple_cnn",
        CNN,
        VIT,
        "timm/test_convnext",
    ],
)
@pytest.mark.parametrize("kind", SMALL)
def test_every_decoder_fits_every_backbone_that_has_its_maps(
    kind: str, backbone: str, size: tuple[int, int], tmp_path: Path
) -> None:
    if kind != "dpt" or backbone == VIT:
        check_sizes_and_gradients(model(tmp_path, kind, backbone, size), size)


@pytest.mark.parametrize("kind", ["deeplabv3plus", "dpt"])
@torch.no_grad()
def test_images_of_whole_multiples_give_what_the_library_gives(kind: str, tmp_path: Path) -> None:
    own = model(
        tmp_path, kind, backbone_of(kind), (64, 64), output_stride=16 if kind != "dpt" else None
    ).eval()
    features = own.features(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    head: Any = own.heads["mask"]
    names, decoder = head.reads, head.module.decoder
    if kind == "dpt":
        whole = decoder([features[n] for n in names[::2]], [features[n] for n in names[1::2]])
        whole = head.module.head(whole)
    else:
        whole = decoder([features[names[0]], features[names[0]], features[names[0]], features[names[1]]])
    expected = nn.functional.interpolate(
        head.module.output(whole), size=(64, 64), mode="bilinear", align_corners=kind == "dpt"
    )
    torch.testing.assert_close(own.head_forward("mask", features, (64, 64)), expected)


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "block") for kind in SMALL), ("upernet", "stage")])
def test_gradient_checkpointing_covers_decoders_with_equal_numbers(
    kind: str, mode: str, tmp_path: Path
) -> None:
    plain = model(tmp_path, kind, backbone_of(kind))
    checkpointed = model(tmp_path, kind, backbone_of(kind), checkpointing=mode)
    # What the heads keep beside the features.
    less, more = (saved_bytes_of_heads(own) for own in (checkpointed, plain))
    assert less == more if kind == "linear" else less < more
    expected, found = state_after_two_steps(plain), state_after_two_steps(checkpointed)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert expected.keys() == found.keys()


def saved_bytes_of_heads(own: MultitaskModel) -> int:
    own.backbone.requires_grad_(False)  # type: ignore[union-attr]
    try:
        return saved_bytes(own)
    finally:
        own.backbone.requires_grad_(True)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", OF_THE_LIBRARY)
def test_norms_follow_the_model_unless_the_decoder_says_otherwise(kind: str, tmp_path: Path) -> None:
    def norms(**more: Any) -> set[type]:
        head = model(tmp_path, kind, backbone_of(kind), **more).heads["mask"]
        kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm)
        return {type(part) for part in head.modules() if isinstance(part, kinds)}

    assert norms(norm="frozen") == {nn.GroupNorm}
    assert norms(norm="group", decoder={"norm": "batch"}) == {nn.BatchNorm2d}
    assert norms(norm="sync") == {nn.SyncBatchNorm}


def test_a_frozen_backbone_leaves_its_decoders_to_train(tmp_path: Path) -> None:
    own = model(tmp_path, "upernet", frozen=True)
    assert all(p.requires_grad for p in own.heads.parameters())
    assert own.heads["mask"].training and not any(p.requires_grad for p in own.shared_parameters())


def test_dpt_reads_blocks_and_meets_other_heads_at_the_last_one(tmp_path: Path) -> None:
    own = model(tmp_path, "dpt", VIT)
    assert own.feature_names("mask") == (
        *("block_1", "block_1_prefix", "block_3", "block_3_prefix"),
        *("block_4", "block_4_prefix", "stride_16", "block_6_prefix"),
    )
    assert set(own.feature_names("kind")) <= set(own.feature_names("mask"))
    few = model(tmp_path, "dpt", VIT, decoder={"from_blocks": [2, 4], "readout": "ignore"})
    assert few.feature_names("mask") == ("block_2", "block_4")
    assert few.feature_names("kind") == ("stride_16",)
    features = few.features(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    maps = ("block_2", "block_4", "stride_16")
    assert {name: tuple(feature.shape) for name, feature in features.items()} == {
        name: (2, 64, 2, 2) for name in maps
    }


@pytest.mark.parametrize("readout", ["cat", "add", "ignore"])
def test_what_becomes_of_the_class_token_changes_the_map(readout: str, tmp_path: Path) -> None:
    own = model(tmp_path, "dpt", VIT, decoder={"readout": readout}).eval()
    features = own.features(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    before = own.head_forward("mask", features, (32, 32))
    other = {n: f + 1 if n.endswith("prefix") else f for n, f in features.items()}
    assert torch.equal(before, own.head_forward("mask", other, (32, 32))) == (readout == "ignore")


NO_TOKEN = {"timm": {"arguments": {"class_token": False, "global_pool": "avg"}}}
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "dpt",
        CNN,
        {},
        "expected a plain ViT of timm .*, found timm/test_resnet. Use unet, fpn, linear, upernet",
    ),
    ("dpt", "resnet18", {}, "expected a plain ViT of timm .*, found resnet18"),
    ("dpt", VIT, {"decoder": {"from_blocks": [2, 9]}}, "rising numbers up to 6, .* found 2, 9"),
    ("dpt", VIT, {**NO_TOKEN, "decoder": {"readout": "cat"}}, "expected ignore for a backbone without"),
    ("deeplabv3plus", "resnet18", {"output_stride": 8}, "none with resnet18, which can't be dilated to 8"),
    ("deeplabv3plus", VIT, {"output_stride": 16}, "none with timm/test_vit, which can't be dilated to 16"),
]


@pytest.mark.parametrize(("kind", "backbone", "more", "line"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_line_that_names_what_does(
    kind: str, backbone: str, more: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line) as error:
        model(tmp_path, kind, backbone, **more)
    assert "\n" not in str(error.value)


def test_settings_of_a_decoder_are_held_against_their_types(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decoder\.width: expected .*at least 1|decoder.*width.*1"):
        settings(tmp_path, "upernet", decoder={"width": 0})
    with pytest.raises(UserError, match="atrous_rates"):
        settings(tmp_path, "deeplabv3plus", decoder={"atrous_rates": [1, 2]})
    with pytest.raises(UserError, match="output_stride: expected none with simple_cnn"):
        settings(tmp_path, "deeplabv3plus", "simple_cnn", output_stride=16)


@pytest.mark.parametrize("kind", OF_THE_LIBRARY)
def test_without_the_library_one_line_says_what_to_install(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=rf"which has {kind}, found none .*mtl-dist\[decoders\]"):
        model(tmp_path, kind, backbone_of(kind))


@pytest.mark.parametrize(
    ("backbone", "stride"), [("resnet50", 8), ("mobilenet_v3_large", 16), (CNN, 16), (CNN, 8)]
)
def test_a_dilated_backbone_ends_at_the_stride_that_was_asked_for(
    backbone: str, stride: int, tmp_path: Path
) -> None:
    own = model(tmp_path, "deeplabv3plus", backbone, (64, 64), output_stride=stride)
    assert own.feature_names("mask") == ("stride_4", f"stride_{stride}")
    assert list(remarks(own)) == []


def test_deeplab_over_stride_32_says_so(tmp_path: Path) -> None:
    (line,) = remarks(model(tmp_path, "deeplabv3plus"))
    assert line.startswith("mask, depth: deeplabv3plus reads the backbone at stride 32")


def test_a_vector_head_is_given_its_map_where_the_decoder_reads_another(tmp_path: Path) -> None:
    features: dict[str, Tensor] = model(tmp_path, "dpt", VIT, decoder={"from_blocks": [1]}).features(
        torch.zeros(2, 3, 32, 32)
    )
    assert set(features) == {"stride_16", "block_1", "block_1_prefix"}
