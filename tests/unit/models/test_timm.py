"""Backbones of timm: their maps, sizes, weights, layers, and what is recomputed of them."""

from __future__ import annotations

import copy
import pickle
import socket
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.models.backbones import build_network, make_backbone, published_normalisation
from mtl_dist.models.building import build_model
from mtl_dist.models.features import Wanted
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import ModelSettings, TimmSettings
from mtl_dist.optim import OptimSettings, build_optimizer
from mtl_dist.specs import HeadSpec

timm = pytest.importorskip("timm")

VECTOR, MAP = HeadSpec("kind", "vector", 3), HeadSpec("mask", "map", 2)
VIT, CNN = "timm/test_vit", "timm/test_resnet"


def model(name: str = VIT, size: tuple[int, int] = (48, 64), channels: int = 3, **settings) -> MultitaskModel:
    torch.manual_seed(0)
    return build_model(ModelSettings(backbone=name, **settings), [VECTOR, MAP], channels, size)


def backbone(name: str, strides: tuple[int, ...], size: tuple[int, int] = (64, 96), **settings) -> nn.Module:
    torch.manual_seed(0)
    own = ModelSettings(backbone=name, **settings)
    return make_backbone(build_network(own, 3, size), Wanted(frozenset(strides)), True, own).eval()


def shapes(features: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(feature.shape[1:]) for name, feature in features.items()}


@torch.no_grad()
def test_a_plain_vit_has_finer_maps_made_of_its_own_and_a_vector_that_is_its_mean() -> None:
    features = backbone(VIT, (4, 8, 16))(torch.randn(1, 3, 64, 96))
    assert shapes(features) == {
        "stride_4": (16, 16, 24),
        "stride_8": (32, 8, 12),
        "stride_16": (64, 4, 6),
        "vector": (64,),
    }
    torch.testing.assert_close(features["vector"], features["stride_16"].mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("name", [CNN, "timm/test_convnext"])
def test_maps_are_those_that_timm_gives(name: str) -> None:
    own = backbone(name, (8, 32))
    original = timm.create_model(name.removeprefix("timm/"), features_only=True).eval()
    state = {key.replace("network.", ""): value for key, value in own.state_dict().items()}
    renamed = {key.replace(".", "_", 1) if key.startswith("stages") else key: v for key, v in state.items()}
    original.load_state_dict(renamed if set(renamed) == set(original.state_dict()) else state, strict=False)
    images = torch.randn(2, 3, 64, 96)
    found, expected = own(images), dict(zip(original.feature_info.reduction(), original(images), strict=True))
    for stride in (8, 32):
        assert found[f"stride_{stride}"].shape == expected[stride].shape
        if set(state) == set(original.state_dict()) or set(renamed) == set(original.state_dict()):
            torch.testing.assert_close(found[f"stride_{stride}"], expected[stride])


@torch.no_grad()
def test_blocks_choose_where_the_maps_of_a_plain_vit_come_from() -> None:
    images = torch.randn(1, 3, 64, 96)
    own = backbone(VIT, (4, 8, 16), timm=TimmSettings(blocks=(1, 3, 6)))
    network = own.network
    expected = network.forward_intermediates(images, [0, 2, 5], norm=True, intermediates_only=True)
    features = own(images)
    assert torch.equal(features["stride_16"], expected[2])
    assert torch.equal(features["stride_8"], own.pyramid["8"](expected[1]))
    assert len(backbone(VIT, (16,), timm=TimmSettings(blocks=(2,))).network.blocks) == 2


def test_images_of_any_size_are_taken(recwarn: pytest.WarningsRecorder) -> None:
    vit = model(size=(50, 70))
    for size in ((50, 70), (37, 61), (96, 32)):
        outputs = vit(torch.randint(0, 255, (2, 3, *size)).float())
        assert outputs["mask"].shape[2:] == size


@pytest.mark.parametrize(("name", "channels"), [(VIT, 1), (VIT, 3), (CNN, 3), (CNN, 4)])
def test_a_file_of_timm_gives_its_weights_and_its_classifier_is_ignored(
    name: str, channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    original = timm.create_model(name.removeprefix("timm/"))
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(original.state_dict(), path)
    loaded = model(name, channels=channels, size=(160, 160), weights=str(path)).backbone.network.state_dict()
    state = original.state_dict()
    same = [key for key, value in loaded.items() if key in state and value.shape == state[key].shape]
    assert all(torch.equal(loaded[key], state[key]) for key in same if channels == 3 or value_of_body(key))
    assert len(loaded) - len(same) <= (0 if channels == 3 else 1)
    assert not [key for key in loaded if key.startswith("head")]


def value_of_body(key: str) -> bool:
    return "patch_embed" not in key and not key.startswith("conv1")


def test_position_embeddings_of_a_file_are_resampled(tmp_path: Path) -> None:
    original = timm.create_model("test_vit")
    torch.save(original.state_dict(), tmp_path / "vit.pth")
    own = model(size=(48, 64), weights=str(tmp_path / "vit.pth")).backbone.network
    assert own.pos_embed.shape[1] != original.pos_embed.shape[1]
    assert own.pos_embed.std() > 0


def test_a_checkpoint_of_a_run_gives_backbone_and_pyramid(tmp_path: Path) -> None:
    first = model()
    safetensors.torch.save_file(
        {f"model.{k}": v for k, v in first.state_dict().items()}, tmp_path / "m.safetensors"
    )
    torch.manual_seed(5)
    second = build_model(
        ModelSettings(backbone=VIT, weights=str(tmp_path / "m.safetensors")), [VECTOR, MAP], 3, (48, 64)
    )
    for (name, value), other in zip(
        first.backbone.state_dict().items(), second.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone": "timm/vit_smal_patch16_224"}, "Did you mean timm/vit_small_patch16_224"),
        ({"backbone": "timm/resnet18.a1_in1"}, "Did you mean a1_in1k"),
        ({"backbone": CNN, "timm": TimmSettings(blocks=(1,))}, "maps at the strides"),
        ({"backbone": VIT, "timm": TimmSettings(blocks=(3, 99))}, "1 number or 3 rising ones up to 6"),
        ({"backbone": VIT, "timm": TimmSettings(arguments={"drop_pth": 0.1})}, "can't be built"),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as error:
        build_network(ModelSettings(**settings), 3, (64, 64))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"model\.weights: expected the weights of timm/test_convnext"):
        model("timm/test_convnext", weights=str(tmp_path / "w.pth"))


def test_without_a_connection_the_hub_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise socket.gaierror("no such host")

    def waits(_seconds: float) -> None:
        raise AssertionError("it waits to try again")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", offline)
    monkeypatch.setattr("time.sleep", waits)
    with pytest.raises(UserError) as error:
        model(weights="timm")
    assert str(error.value) == (
        f"model.weights: expected timm to have the weights of {VIT} or to fetch them, found: no such host. "
        "Fetch the file on a machine with a connection and give its path."
    )
    assert caplog.text == ""


def test_options_of_timm_are_refused_with_another_backbone() -> None:
    with pytest.raises(ValueError, match="expected none with resnet18"):
        ModelSettings(timm=TimmSettings(blocks=(1,)))
    with pytest.raises(ValueError, match="found torchvision"):
        ModelSettings(backbone=VIT, weights="torchvision")


def test_images_are_normalised_as_the_network_says() -> None:
    assert published_normalisation("timm/vit_tiny_patch16_224", 3) == ([127.5] * 3, [127.5] * 3)
    assert published_normalisation("timm/convnext_atto", 3)[0] == pytest.approx([123.675, 116.28, 103.53])
    assert published_normalisation(VIT, 1) == ([127.5], [127.5])


@pytest.mark.parametrize(
    ("name", "mode"), [(VIT, "block"), (CNN, "stage"), ("timm/test_efficientnet", "block")]
)
def test_recomputing_changes_neither_gradients_nor_statistics(name: str, mode: str) -> None:
    images = torch.randint(0, 255, (2, 3, 48, 64)).float()
    plain, recomputing = model(name), model(name, checkpointing=mode)
    recomputing.load_state_dict(plain.state_dict())
    for one in (plain, recomputing):
        torch.manual_seed(3)
        sum(output.square().sum() for output in one(images).values()).backward()
    for (key, p), q in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    for (key, p), q in zip(plain.named_buffers(), recomputing.buffers(), strict=True):
        assert torch.equal(p, q), key


def test_recomputing_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(mode: str) -> int:
        one, total = model(checkpointing=mode), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (total.append(t.numel()), t)[1], lambda t: t):
            one(torch.randn(2, 3, 64, 64))
        return sum(total)

    assert kept("block") < 0.8 * kept("off")


@pytest.mark.parametrize("name", [VIT, CNN])
def test_a_copied_and_a_pickled_backbone_recompute_their_own_weights(name: str) -> None:
    own = model(name, checkpointing="block")
    images = torch.randint(0, 255, (2, 3, 48, 64)).float()
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        sum(output.sum() for output in other(images).values()).backward()
        assert all(p.grad is None for p in own.parameters())
        assert all(p.grad is not None for p in other.parameters())


def test_every_parameter_that_trains_is_reached() -> None:
    for name in (VIT, CNN, "timm/test_vit3"):
        own = model(name)
        sum(output.sum() for output in own(torch.randn(2, 3, 48, 64)).values()).backward()
        assert not [key for key, p in own.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("decoder", ["fpn", "linear"])
@pytest.mark.parametrize("name", [VIT, "resnet18"])
def test_a_decoder_is_given_the_maps_that_it_reads_and_no_other_is_made(name: str, decoder: str) -> None:
    settings = ModelSettings.model_validate({"backbone": name, "decoder": {"kind": decoder}})
    own = build_model(settings, [VECTOR, MAP], 3, (48, 64))
    features = own.features(torch.randn(2, 3, 48, 64))
    loss = own.heads_forward(features, (48, 64))["mask"].sum()
    grads = torch.autograd.grad(loss, [features[key] for key in own.feature_names("mask")], retain_graph=True)
    assert all(gradient.any() for gradient in grads)
    loss.backward()
    assert not [key for key, p in own.backbone.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", [VIT, CNN, "resnet18"])
def test_the_rate_falls_layer_by_layer(name: str) -> None:
    own = model(name)
    optimizer = build_optimizer(OptimSettings(lr=1.0, layer_decay=0.5), own, ["kind", "mask"], [])
    rate = {p: group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    layers = own.backbone.parameters_by_layer()
    assert {p for layer in layers for p in layer} == set(own.backbone.parameters())
    for number, layer in enumerate(reversed(layers)):
        assert {rate[p] for p in layer} == {0.5**number}
    assert {rate[p] for head in own.heads.values() for p in head.parameters()} == {1.0}
    assert len(layers) > 3


def test_the_network_is_called_as_a_module_so_that_an_engines_hooks_see_it() -> None:
    own = model()
    seen: list[str] = []
    own.backbone.network.register_forward_pre_hook(lambda *_: seen.append("before"))
    own(torch.randn(1, 3, 48, 64))
    assert seen == ["before"]


def test_position_embeddings_are_not_decayed() -> None:
    own = model()
    optimizer = build_optimizer(OptimSettings(weight_decay=0.1), own, ["kind", "mask"], [])
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[own.backbone.network.pos_embed] == 0
    assert decay[own.backbone.network.patch_embed.proj.weight] == 0.1


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_norms_of_timm_keep_their_activation_when_they_are_converted(norm: str) -> None:
    plain, converted = model("timm/test_efficientnet"), model("timm/test_efficientnet", norm=norm)
    assert set(converted.backbone.state_dict()) <= set(plain.backbone.state_dict())
    if norm == "frozen":
        converted.load_state_dict(plain.state_dict(), strict=False)
        images = torch.randn(2, 3, 48, 64)
        found, expected = converted.eval().features(images), plain.eval().features(images)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key])
