"""LoRA on a frozen backbone: what trains, what never changes, what is shared, and what merging leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_dist.config.loading import load_settings
from mtl_dist.errors import UserError
from mtl_dist.models.adapters import merge_adapters
from mtl_dist.models.building import build_model
from mtl_dist.models.describe import parameters_in_words
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import AdapterSettings, ModelSettings
from mtl_dist.models.weights import is_adapter, read_state_dict, without_base
from mtl_dist.optim import OptimSettings, build_optimizer
from mtl_dist.specs import HeadSpec

pytest.importorskip("peft")
pytest.importorskip("timm")

SPECS = [HeadSpec("type", "vector", 3), HeadSpec("mask", "map", 2)]
VIT, CNN = "timm/test_vit", "timm/test_resnet"
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def model(backbone: str = VIT, adapter: dict[str, Any] | None = None, **more: Any) -> MultitaskModel:
    torch.manual_seed(0)
    own = AdapterSettings(**(adapter or {}))
    return build_model(ModelSettings(backbone=backbone, adapter=own, **more), SPECS, 3, (32, 32))


def loss(own: MultitaskModel) -> Tensor:
    return torch.stack([output.square().mean() for output in own(IMAGES).values()]).sum()


def trained(own: MultitaskModel, num_steps: int = 3) -> MultitaskModel:
    parts = build_optimizer(OptimSettings(lr=1e-2), own, ["type", "mask"], [])
    held = {p for group in parts.param_groups for p in group["params"]}
    assert held == {p for p in own.parameters() if p.requires_grad}
    for _ in range(num_steps):
        parts.zero_grad()
        loss(own).backward()
        parts.step()
    assert set(parts.state) == held
    return own


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("backbone", [VIT, CNN])
def test_the_base_never_changes_and_adapters_do(backbone: str, per_task: bool) -> None:
    own = model(backbone, {"per_task": per_task})
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    trained(own)
    after = own.state_dict()
    assert all(p.grad is not None for p in own.parameters() if p.requires_grad)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    of_backbones = {name for name in changed if name.startswith("backbone")}
    assert of_backbones and all(is_adapter(name) or ".pyramid." in name for name in of_backbones)
    if backbone == VIT:  # untrained, timm's ResNet begins with branches that are multiplied by 0
        assert all(name in changed for name in before if is_adapter(name))


def test_what_is_adapted_follows_the_backbone_and_the_targets() -> None:
    def adapted(*args: Any, **more: Any) -> set[str]:
        names = [name for name, _ in model(*args, **more).named_parameters() if is_adapter(name)]
        return {name.split(".lora_")[0].rpartition(".")[2] for name in names}

    assert adapted(VIT) == {"qkv", "proj", "fc1", "fc2"}
    assert adapted(VIT, {"targets": ("qkv",)}) == {"qkv"}
    layers = dict(model(CNN).named_modules())
    kept = [layer for name, layer in layers.items() if name.endswith(".base_layer")]
    assert kept and all(isinstance(layer, nn.Conv2d) and layer.groups == 1 for layer in kept)


def test_a_target_that_is_nothing_is_told_its_neighbour() -> None:
    with pytest.raises(
        UserError, match=r"timm/test_vit that can be adapted \(proj, qkv, .*found qvk\. Did you mean qkv"
    ):
        model(VIT, {"targets": ("qvk",)})
    with pytest.raises(UserError, match=r"of resnet18 that can be adapted .*found fc"):
        model("resnet18", {"targets": ("fc",)})


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "backbone", ["swin_t", "vit_b_32", "convnext_tiny", "mobilenet_v3_small", "resnet18"]
)
def test_adapters_of_torchvision_are_all_reached_by_gradients(backbone: str) -> None:
    own = model(backbone)
    loss(own).backward()
    assert all(p.grad is not None for p in own.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_layer_whose_weight_is_read_without_a_call_is_no_target() -> None:
    with pytest.raises(UserError, match=r"of swin_t that can be adapted .*found qkv"):
        model("swin_t", {"targets": ("qkv",)})


def test_a_shared_adapter_is_what_the_tasks_share_and_one_per_task_is_not() -> None:
    shared = model(VIT)
    sharing = {id(p) for p in shared.shared_parameters() if p.requires_grad}
    adapters = {id(p) for name, p in shared.named_parameters() if is_adapter(name)}
    assert adapters and adapters <= sharing
    assert shared.feature_names("type") == ("stride_16",)
    own = model(VIT, {"per_task": True})
    assert not [p for p in own.shared_parameters() if p.requires_grad]
    assert own.feature_names("type") == ("type/vector",)
    tasks = [{id(p) for p in own.task_parameters(t) if p.requires_grad} for t in ("type", "mask")]
    assert not tasks[0] & tasks[1]
    common = [
        {name: p for name, p in backbone.named_parameters() if ".base_layer." in name}
        for backbone in own.all_backbones()
    ]
    assert all(common[0][name] is common[1][name] for name in common[0])
    assert all(
        name.startswith(("backbones.type.", "backbones.mask.", "heads."))
        for name, _ in own.named_parameters()
    )


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("backbone", [VIT, CNN])
def test_merging_changes_no_output_and_leaves_the_names_of_a_plain_model(
    backbone: str, per_task: bool
) -> None:
    own = trained(model(backbone, {"per_task": per_task})).eval()
    with torch.no_grad():
        before = own(IMAGES)
        merge_adapters(own)
        after = own(IMAGES)
    for task, output in before.items():
        assert float((after[task] - output).abs().max()) <= 1e-5 * max(1.0, float(output.abs().max()))
    sharing = "separate" if per_task else "hard"
    plain = build_model(ModelSettings(backbone=backbone, sharing=sharing), SPECS, 3, (32, 32))  # type: ignore[arg-type]
    plain.load_state_dict(own.state_dict())
    torch.testing.assert_close(plain.eval()(IMAGES), after)


@pytest.mark.parametrize("per_task", [False, True])
def test_gradient_checkpointing_computes_adapters_again_with_equal_numbers(per_task: bool) -> None:
    def gradients(mode: str) -> list[Tensor]:
        own = model(VIT, {"per_task": per_task, "dropout": 0.3}, checkpointing=mode)
        torch.manual_seed(1)
        loss(own).backward()
        return [p.grad for p in own.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients("off"), gradients("block"), strict=True))


def test_a_frozen_base_stays_in_evaluation_mode_while_adapters_drop_values() -> None:
    own = model(CNN, {"dropout": 0.9}).train()
    norms = [m for m in own.backbone.modules() if isinstance(m, nn.BatchNorm2d)]  # type: ignore[union-attr]
    assert norms and not any(norm.training for norm in norms)
    trained(own, 1)
    first, second = own(IMAGES)["mask"], own(IMAGES)["mask"]
    assert not torch.equal(first, second)
    own.eval()
    assert torch.equal(own(IMAGES)["mask"], own(IMAGES)["mask"])


def test_the_parameters_that_train_are_counted() -> None:
    own = model(VIT)
    training = sum(p.numel() for p in own.parameters() if p.requires_grad)
    assert f"of which {training:,} train; frozen: backbone.network, but for adapters" in parameters_in_words(
        own
    )


def test_other_ways_of_sharing_and_wrong_numbers_are_refused(tmp_path: Path) -> None:
    def read(**data: Any) -> None:
        (tmp_path / "model.yaml").write_text(json.dumps(data))
        load_settings(ModelSettings, tmp_path / "model.yaml")

    with pytest.raises(UserError, match=r"sharing: expected hard with model.adapter, found .*per_task"):
        read(sharing="separate", adapter={"kind": "lora"})
    with pytest.raises(UserError, match=r"adapter\.rank"):
        read(adapter={"rank": 0})
    with pytest.raises(UserError, match=r"adapter\.kind"):
        read(adapter={"kind": "lorra"})


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"expected peft, .*mtl-dist\[adapters\]"):
        model(VIT)


def test_weights_with_adapters_beside_them_are_no_weights_of_a_network(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({f"model.{name}": tensor for name, tensor in model(VIT).state_dict().items()}, path)
    assert any(name != without_base(name) for name in read_state_dict(path))
    with pytest.raises(
        UserError, match=r"those of a run with model\.adapter beside them\. Merge them: mtl export"
    ):
        build_model(ModelSettings(backbone=VIT, weights=str(path)), SPECS, 3, (32, 32))
