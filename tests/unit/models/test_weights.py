"""Pretrained weights: loaded exactly, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.models.backbones import build_network
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.weights import fit_channels
from mtl_dist.specs import HeadSpec


def original(name: str = "squeezenet1_1") -> nn.Module:
    torch.manual_seed(1)
    return torchvision.models.get_model(name)


def loaded(
    path: Path | str, name: str = "squeezenet1_1", channels: int = 3, size: int = 64
) -> dict[str, Tensor]:
    settings = ModelSettings(backbone=name, weights=str(path))
    return build_network(settings, channels, (size, size)).module.state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_gives_the_backbone_its_weights_and_the_classifier_is_ignored(
    suffix: str, tmp_path: Path
) -> None:
    model = original()
    model.classifier = nn.Linear(512, 7)
    path = tmp_path / f"weights{suffix}"
    state = model.state_dict()
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = loaded(path)
    for key, value in state.items():
        if not key.startswith("classifier"):
            assert torch.equal(found[key], value), key


def test_a_checkpoint_of_a_run_gives_its_shared_backbone(tmp_path: Path) -> None:
    specs = [HeadSpec("breed", "vector", 3)]
    trained = build_model(ModelSettings(backbone="squeezenet1_1"), specs, 3, (64, 64))
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state | {"balancer.num_unconverged": torch.zeros(())}, path)
    found = loaded(path)
    for name, value in trained.backbone.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(found[name], value), name


def test_torchvision_weights_come_through_its_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = original("squeezenet1_1").state_dict()
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save(state, cache / url.rpartition("/")[2])
    found = loaded("torchvision", "squeezenet1_1")
    assert torch.equal(found["features.3.squeeze.weight"], state["features.3.squeeze.weight"])


def test_a_failed_download_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UserError, match="download torchvision's weights of squeezenet1_1, found: no route"):
        loaded("torchvision", "squeezenet1_1")


def test_densenet_files_with_the_old_names_load(tmp_path: Path) -> None:
    state = original("densenet121").state_dict()
    old = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in key else key: value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }
    torch.save(old, tmp_path / "old.pth")
    key = "features.denseblock2.denselayer3.conv2.weight"
    assert torch.equal(loaded(tmp_path / "old.pth", "densenet121")[key], state[key])


@pytest.mark.slow
def test_vit_positions_are_interpolated_to_the_image_size(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torchvision.models.vit_b_32(image_size=64).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    found = loaded(tmp_path / "vit.pth", "vit_b_32", size=96)["encoder.pos_embedding"]
    assert found.shape == (1, 1 + 9, 768)
    corners = [0, 1, 3, 7, 9]
    assert torch.allclose(found[0, corners], state["encoder.pos_embedding"][0], atol=1e-6)


def test_a_grey_image_gives_what_its_rgb_copy_gives() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    grey = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = torch.conv2d(grey.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(torch.conv2d(grey, fit_channels(weight, 1)), expected)
    six = torch.conv2d(grey.expand(-1, 6, -1, -1), fit_channels(weight, 6))
    torch.testing.assert_close(six, expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_file_for_three_channels_fits_other_images(channels: int, tmp_path: Path) -> None:
    state = original().state_dict()
    torch.save(state, tmp_path / "w.pth")
    found = loaded(tmp_path / "w.pth", channels=channels)
    key = "features.0.weight"
    assert torch.equal(found[key], fit_channels(state[key], channels))
    assert torch.equal(found["features.3.squeeze.weight"], state["features.3.squeeze.weight"])


def test_a_file_of_another_network_lists_what_is_missing_and_unexpected(tmp_path: Path) -> None:
    state = original().state_dict()
    state["extra.weight"] = torch.zeros(2)
    state["features.3.squeeze.weight"] = torch.zeros(3)
    del state["features.0.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        loaded(tmp_path / "w.pth")
    message = str(caught.value)
    assert "missing: features.0.weight; unexpected: extra.weight" in message
    assert "of another shape: features.3.squeeze.weight (3,), not (16, 64, 1, 1)" in message
    assert "\n" not in message


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: .* and \d+ more"):
        loaded(tmp_path / "w.pth")


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no file .*absent\.pth"):
        loaded(tmp_path / "absent.pth")
    for name in ("garbage.pth", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all" * 9)
        with pytest.raises(UserError, match=f"{name}, found a file that can't be read"):
            loaded(tmp_path / name)
    for start in (b"hello", b"version https://git-lfs", b"<html>", b"\x80\x02K", b"PK\x03\x04"):
        (tmp_path / "start.pth").write_bytes(start)
        with pytest.raises(UserError, match=r"start.pth, found a file that can't be read \([^\n\x1b]*\)"):
            loaded(tmp_path / "start.pth")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match=r"expected names and tensors in .*, found the keys 1"):
        loaded(tmp_path / "numbers.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read"):
        loaded(tmp_path / "empty.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"found the keys model, epoch\. Save the plain state dict"):
        loaded(tmp_path / "checkpoint.pth")


def test_a_file_that_would_run_code_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(original("squeezenet1_1"), tmp_path / "whole_module.pth")
    with pytest.raises(
        UserError, match=r"can't be read \(more than tensors: torchvision\.models\.squeezenet\.SqueezeNet\)"
    ):
        loaded(tmp_path / "whole_module.pth", "squeezenet1_1")


def test_simple_cnn_has_no_published_weights() -> None:
    with pytest.raises(UserError, match="simple_cnn has no weights in torchvision"):
        loaded("torchvision", "simple_cnn")
