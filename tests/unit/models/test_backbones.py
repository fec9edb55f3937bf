"""Backbones: the right maps and vectors, of any torchvision classifier."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from accelerate import init_empty_weights
from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.models.backbones import Backbone, backbone_names, build_network, published_normalisation
from mtl_dist.models.features import Wanted
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.torchvision_names import torchvision_names

PYRAMID = [2, 4, 8, 16, 32]
PYRAMIDS = {
    "alexnet": [4, 8, 16, 32],
    "convnext_tiny": [4, 8, 16, 32],
    "densenet121": PYRAMID,
    "efficientnet_b0": PYRAMID,
    "googlenet": PYRAMID,
    "inception_v3": PYRAMID,
    "maxvit_t": PYRAMID,
    "mnasnet0_5": PYRAMID,
    "mobilenet_v2": PYRAMID,
    "mobilenet_v3_small": PYRAMID,
    "regnet_x_400mf": PYRAMID,
    "resnet18": PYRAMID,
    "shufflenet_v2_x0_5": PYRAMID,
    "squeezenet1_1": [2, 4, 8, 16],
    "swin_t": [4, 8, 16, 32],
    "vgg11": [1, *PYRAMID],
    "vit_b_16": [16],
}


def backbone_of(settings: ModelSettings, size: int) -> Backbone:
    """A backbone that gives its vector."""
    return Backbone(build_network(settings, 3, (size, size)), Wanted(), vector=True, settings=settings)


def on_meta(name: str, size: int) -> tuple[Backbone, dict[str, Tensor]]:
    """A backbone without real weights, and all its features for an image of that size."""
    settings = ModelSettings(backbone=name)
    with init_empty_weights(include_buffers=False):
        network = build_network(settings, 3, (size, size))
        backbone = Backbone(
            network, Wanted(frozenset(network.channels)), network.vector_name(True) == "vector", settings
        )
    backbone.to("meta")
    return backbone, backbone(torch.empty(2, 3, size, size, device="meta"))


FAST = ["alexnet", "resnet18", "simple_cnn", "squeezenet1_1", "swin_t", "vit_b_16"]


def marked(name: str) -> Any:
    """One of each family in `make test`, all of them in `make test-all`."""
    marks = [] if name in FAST else [pytest.mark.slow]
    return pytest.param(name, marks=marks if name in {*FAST, *PYRAMIDS} else [*marks, pytest.mark.exhaustive])


def test_the_names_that_are_read_from_torchvision_s_files_are_those_that_it_knows() -> None:
    assert ["simple_cnn", *torchvision_names()] == backbone_names()


@pytest.mark.parametrize("name", map(marked, backbone_names()))
def test_every_torchvision_classifier_gives_its_maps_and_keeps_no_unused_weights(name: str) -> None:
    """Every map has its stride's size, and a loss over all maps reaches every parameter that is left."""
    size = 224
    backbone, features = on_meta(name, size)
    strides = [int(key.removeprefix("stride_")) for key in features if key != "vector"]
    assert strides == PYRAMIDS.get(name, strides)
    assert max(strides) >= (16 if name != "simple_cnn" else 4)
    for stride in strides:
        for side in features[f"stride_{stride}"].shape[2:]:
            assert size / stride / 1.5 <= side <= size / stride * 1.2
    torch.stack([feature.sum() for feature in features.values()]).sum().backward()
    assert [key for key, value in backbone.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize(
    ("name", "classifier"),
    [("resnet18", "fc"), ("mobilenet_v3_small", "classifier"), ("densenet121", "classifier")],
)
def test_the_vector_is_what_torchvision_gives_its_classifier(
    name: str, classifier: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    original = torchvision.models.get_model(name).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    backbone = backbone_of(ModelSettings(backbone=name, weights=str(tmp_path / "weights.pth")), 64).eval()
    setattr(original, classifier, nn.Identity())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)["vector"], original(images), rtol=1e-5, atol=1e-5)


def test_resnet_maps_are_the_outputs_of_its_layers() -> None:
    settings = ModelSettings(backbone="resnet18")
    network = build_network(settings, 3, (64, 64))
    wanted = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
    seen: dict[int, Tensor] = {}
    for stride, layer in wanted.items():
        last = network.module.get_submodule(layer)[-1]  # type: ignore[index]
        last.register_forward_hook(lambda _m, _i, output, stride=stride: seen.update({stride: output}))
    features = Backbone(network, Wanted(frozenset(wanted)), vector=False, settings=settings)(
        torch.randn(2, 3, 64, 64)
    )
    assert list(features) == ["stride_4", "stride_8", "stride_16", "stride_32"]
    for stride in wanted:
        assert torch.equal(features[f"stride_{stride}"], seen[stride])


def test_swin_maps_are_turned_to_channels_first() -> None:
    settings = ModelSettings(backbone="swin_t")
    network = build_network(settings, 3, (64, 64))
    blocks = network.module.get_submodule("features.1")
    seen: list[Tensor] = []
    blocks[-1].register_forward_hook(lambda _m, _i, output: seen.append(output))  # type: ignore[index]
    map_BDHW = Backbone(network, Wanted(frozenset({4})), vector=False, settings=settings)(
        torch.randn(2, 3, 64, 64)
    )["stride_4"]
    assert map_BDHW.shape == (2, 96, 16, 16)
    assert torch.equal(map_BDHW, seen[0].permute(0, 3, 1, 2))


def test_vit_map_is_its_patch_tokens_without_the_class_token() -> None:
    settings = ModelSettings(backbone="vit_b_32")
    network = build_network(settings, 3, (64, 64))
    seen: list[Tensor] = []
    network.module.get_submodule("encoder.ln").register_forward_hook(lambda _m, _i, out: seen.append(out))
    map_BDHW = Backbone(network, Wanted(frozenset({32})), vector=False, settings=settings).eval()(
        torch.randn(2, 3, 64, 64)
    )["stride_32"]
    assert map_BDHW.shape == (2, 768, 2, 2)
    assert torch.equal(map_BDHW[:, :, 1, 0], seen[0][:, 1 + 2])


def test_only_what_is_wanted_is_computed_and_kept() -> None:
    network = build_network(ModelSettings(), 3, (64, 64))
    backbone = Backbone(network, Wanted(frozenset({4})), vector=False, settings=ModelSettings())
    assert set(dict(backbone.named_children())) == {"conv1", "bn1", "relu", "maxpool", "layer1"}
    assert list(backbone(torch.randn(1, 3, 64, 64))) == ["stride_4"]


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "simple_cnn", pytest.param("vit_b_32", marks=pytest.mark.slow)]
)
def test_a_copied_and_a_pickled_backbone_give_the_same(name: str) -> None:
    backbone = backbone_of(ModelSettings(backbone=name), 32).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = backbone(images)["vector"]
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(other(images)["vector"], expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in backbone.parameters()}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t"])
def test_other_image_sizes_run_where_the_network_allows_it(name: str) -> None:
    backbone, _ = on_meta(name, 64)
    assert backbone(torch.empty(1, 3, 96, 160, device="meta"))["stride_16"].shape[2:] == (6, 10)


def test_a_network_of_fixed_size_refuses_another_one() -> None:
    backbone = backbone_of(ModelSettings(backbone="vit_b_32"), 64)
    with pytest.raises(UserError, match=r"expected 64 x 64, .* found 96 x 96"):
        backbone(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnt50", (64, 64), "found 'resnt50'. Did you mean .*resnet50"),
        ("ResNet50", (64, 64), "Did you mean .*resnet50"),
        ("qqqqqq", (64, 64), "Choose one of: simple_cnn, alexnet, "),
        ("alexnet", (16, 16), "alexnet doesn't take images of 16 x 16"),
        ("vit_b_16", (64, 32), "vit_b_16 expected square images, found 64 x 32"),
        ("vit_b_16", (60, 60), "vit_b_16 can't be built for images of 60 x 60"),
        ("maxvit_t", (100, 100), "maxvit_t can't be built for images of 100 x 100"),
        ("simple_cnn", (3, 28), "at least 4 x 4 pixels, found 3 x 28"),
    ],
)
def test_a_wrong_name_or_size_is_one_clear_line(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_network(ModelSettings(backbone=name), 3, size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels_keep_the_size_of_activations(channels: int) -> None:
    torch.manual_seed(0)
    three = build_network(ModelSettings(backbone="squeezenet1_1"), 3, (32, 32))
    other = build_network(ModelSettings(backbone="squeezenet1_1"), channels, (32, 32))
    image = torch.randn(64, 5, 32, 32)
    first = three.module.get_submodule("features.0")
    adapted = other.module.get_submodule("features.0")
    with torch.no_grad():
        ratio = adapted(image[:, :channels]).std() / first(image[:, :3]).std()
    assert 0.8 < float(ratio) < 1.25


def test_normalisation_is_what_the_published_weights_expect() -> None:
    imagenet = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    for name in ("resnet18", "simple_cnn"):
        for found, expected in zip(published_normalisation(name, 3), imagenet, strict=True):
            assert found == pytest.approx(expected, abs=1e-3)
    for name in ("inception_v3", "efficientnet_v2_l"):
        assert published_normalisation(name, 3) == ([127.5] * 3, [127.5] * 3)
    assert published_normalisation("resnet18", 1) == ([127.5], [127.5])
