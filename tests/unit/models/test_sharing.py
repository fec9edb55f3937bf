"""Ways of sharing: what is shared, where gradients are told apart, and the equations of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.config.loading import load_settings, to_yaml
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.describe import describe
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.sharing.cross_stitch import CrossStitch
from mtl_dist.models.sharing.mmoe import MMoE
from mtl_dist.models.sharing.mtan import MTAN
from mtl_dist.models.sharing.separate import Separate
from mtl_dist.optim import OptimSettings, build_optimizer
from mtl_dist.specs import HeadSpec

KIND, AGE = HeadSpec("kind", "vector", 3), HeadSpec("age", "vector", 1)
MASK, DEPTH = HeadSpec("mask", "map", 2), HeadSpec("depth", "map", 1)
TASKS = {"vectors": [KIND, AGE], "maps": [MASK, DEPTH], "both": [KIND, AGE, MASK]}
WAYS: dict[str, Any] = {
    "mmoe": "mmoe",
    "narrow mmoe": {"kind": "mmoe", "num_experts": 3, "width": 24, "kernel_size": 1},
    "mtan": "mtan",
    "cross_stitch": "cross_stitch",
    "cross_stitch by layer": {"kind": "cross_stitch", "per": "layer", "own_weight": 0.7},
}
BACKBONES = {"simple_cnn": "batch", "squeezenet1_1": "group", "resnet18": "group"}


def model_of(
    way: Any, specs: Sequence[HeadSpec] = TASKS["both"], backbone: str = "simple_cnn", **settings: Any
) -> MultitaskModel:
    stated = {"backbone": backbone, "sharing": way, "norm": BACKBONES.get(backbone, "batch"), **settings}
    torch.manual_seed(0)
    model = build_model(ModelSettings.model_validate(stated), specs, 3, (32, 32))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def images(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)


def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: output.square().mean() for task, output in outputs.items()}


@pytest.mark.parametrize(
    ("tasks", "backbone"), [*((tasks, "simple_cnn") for tasks in TASKS), ("both", "squeezenet1_1")]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_is_shared_or_reached_by_its_task_alone(way: str, tasks: str, backbone: str) -> None:
    model = model_of(WAYS[way], TASKS[tasks], backbone)
    own = {id(p): task for task in model.heads for p in model.task_parameters(task)}
    shared = {id(p) for p in model.shared_parameters()}
    assert not own.keys() & shared and own.keys() | shared == {id(p) for p in model.parameters()}
    found = losses(model(images()))
    reached: dict[int, set[str]] = {}
    for task, loss in found.items():
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                reached.setdefault(id(parameter), set()).add(task)
    for name, parameter in model.named_parameters():
        tasks_of = reached.get(id(parameter), set())
        assert tasks_of, f"{name} is reached by no task"
        if id(parameter) in own:
            assert tasks_of == {own[id(parameter)]}, name
        elif way.startswith("cross_stitch"):
            assert tasks_of == set(model.heads), name
        else:
            assert len(tasks_of) > 1, name


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_at_the_features_are_those_of_all_that_is_shared(way: str, tasks: str) -> None:
    model = model_of(WAYS[way], TASKS[tasks])
    features = model.features(images())
    outputs = model.heads_forward(features, (32, 32))
    leaves = {name: feature.detach().requires_grad_() for name, feature in features.items()}
    cut_off = losses(model.heads_forward(leaves, (32, 32)))
    shared = model.shared_parameters()
    assert set(features) == {name for task in model.heads for name in model.feature_names(task)}
    for task, loss in losses(outputs).items():
        read = model.feature_names(task)
        direct = torch.autograd.grad(
            loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        at_features = torch.autograd.grad(loss, [features[name] for name in read], retain_graph=True)
        alone = torch.autograd.grad(cut_off[task], [leaves[name] for name in read])
        through = torch.autograd.grad(
            [features[name] for name in read],
            shared,
            at_features,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        assert all(torch.equal(a, b) for a, b in zip(at_features, alone, strict=True))
        for a, b in zip(direct, through, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_the_gradient_at_the_features_is_that_of_finite_differences() -> None:
    for way in ("mmoe", "mtan"):
        model = model_of(way, backbone="resnet18").double().eval()
        features = {name: f.detach() for name, f in model.features(images()).items()}
        generator = torch.Generator().manual_seed(3)
        name = next(name for name in model.feature_names("kind") if name in model.feature_names("mask"))
        direction = torch.randn(features[name].shape, generator=generator, dtype=torch.float64)

        def loss_at(step: float, features=features, name=name, direction=direction, model=model) -> Tensor:  # type: ignore[no-untyped-def]
            moved = {**features, name: features[name] + step * direction}
            return model.head_forward("mask", moved, (32, 32)).square().mean().detach()

        leaf = features[name].clone().requires_grad_()
        loss = model.head_forward("mask", {**features, name: leaf}, (32, 32)).square().mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        slope = float(loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


# ------------------------------------------------------------------ the equations
def test_mmoe_of_vectors_is_its_equation_in_numpy() -> None:
    model = model_of({"kind": "mmoe", "num_experts": 3, "width": 16}, TASKS["vectors"], "resnet18").eval()
    assert isinstance(model, MMoE)
    with torch.no_grad():
        x = model.backbone(model.normalise(images()))["vector"].numpy().astype(np.float64)
        outputs = model(images())
    weights = {name: tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}
    for task in ("kind", "age"):
        logits = x @ weights[f"gates.{task}.linear.weight"].T
        share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        mixed = np.zeros((4, 16))
        for n in range(3):
            expert = f"experts.vector.{n}.0"
            mixed += share[:, [n]] * np.maximum(
                x @ weights[f"{expert}.weight"].T + weights[f"{expert}.bias"], 0
            )
        head = f"heads.{task}.output"
        np.testing.assert_allclose(
            outputs[task].numpy(), mixed @ weights[f"{head}.weight"].T + weights[f"{head}.bias"], atol=1e-5
        )


def test_mmoe_of_maps_mixes_the_experts_maps_by_a_gate_of_the_pooled_one() -> None:
    way = {"kind": "mmoe", "num_experts": 2, "kernel_size": 1}
    model = model_of(way, TASKS["maps"]).eval()
    assert isinstance(model, MMoE)
    with torch.no_grad():
        raw = model.backbone(model.normalise(images()))
        features = model.features(images())
        inputs = model.head_inputs("depth", features)
        share = torch.nn.functional.softmax(
            raw["stride_4"].mean((2, 3)) @ model.gates["depth"].linear.weight.T,
            1,  # type: ignore[union-attr, operator]
        )
        for name, map_BDHW in raw.items():
            maps = []
            for expert in model.experts[name]:  # type: ignore[union-attr]
                conv, norm, _ = expert  # type: ignore[misc]
                x = torch.einsum("bdhw,od->bohw", map_BDHW, conv.weight[:, :, 0, 0])
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                shift = norm.bias - norm.running_mean * scale
                maps.append((x * scale[:, None, None] + shift[:, None, None]).clamp_min(0))
            mixed = torch.einsum("bn,nbdhw->bdhw", share, torch.stack(maps))
            torch.testing.assert_close(inputs[name], mixed, rtol=1e-4, atol=1e-5)


def test_mmoe_leaves_what_one_task_reads_as_it_is() -> None:
    model = model_of("mmoe", [KIND, MASK], "resnet18")
    assert isinstance(model, MMoE)
    assert list(model.experts) == ["stride_32"]
    assert "stride_4" in model.feature_names("mask") and "pooled" in model.feature_names("mask")


def test_mtan_masks_the_shared_maps_as_its_equation_says() -> None:
    model = model_of("mtan", TASKS["both"], "resnet18").eval()
    assert isinstance(model, MTAN)

    def layer(x: Tensor, conv: Any, norm: Any) -> Tensor:
        size = conv.kernel_size[0]
        columns = F.unfold(x, size, padding=size // 2)
        x = (conv.weight.flatten(1) @ columns).view(len(x), -1, *x.shape[2:])
        groups = x.view(len(x), norm.num_groups, -1)
        deviation = (groups.var(dim=2, unbiased=False, keepdim=True) + norm.eps).sqrt()
        x = ((groups - groups.mean(dim=2, keepdim=True)) / deviation).view(x.shape)
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    with torch.no_grad():
        features = model.features(images())
        attention: Any = model.attention["mask"]
        inputs = model.head_inputs("mask", features)
        assert torch.equal(inputs["stride_2"], features["stride_2"])
        before = None
        for stride in (4, 8, 16, 32):
            p = joined = features[f"stride_{stride}"]
            if before is not None:
                f = attention.encoders[str(stride)]
                encoded = before
                for conv, norm in ((f[0], f[1]), (f[3], f[4]), (f[6], f[7])):
                    encoded = layer(encoded, conv, norm).clamp_min(0)
                height, width = p.shape[2:]
                pooled = encoded.view(*encoded.shape[:2], height, -1, width, encoded.shape[3] // width)
                joined = torch.cat([p, pooled.amax(dim=(3, 5))], dim=1)
            g = attention.masks[str(stride)]
            mask = 1 / (1 + torch.exp(-layer(layer(joined, g[0], g[1]).clamp_min(0), g[3], g[4])))
            before = mask * p
            torch.testing.assert_close(inputs[f"stride_{stride}"], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["simple_cnn", "squeezenet1_1"])
def test_cross_stitch_without_exchange_is_separate_backbones(backbone: str) -> None:
    stitched = model_of({"kind": "cross_stitch", "own_weight": 1.0}, TASKS["maps"], backbone).eval()
    separate = model_of("separate", TASKS["maps"], backbone).eval()
    assert isinstance(separate, Separate)
    state = {name.removeprefix("stitched."): value for name, value in stitched.state_dict().items()}
    separate.load_state_dict({name: state[name] for name in separate.state_dict()})
    with torch.no_grad():
        for task, output in separate(images()).items():
            torch.testing.assert_close(stitched(images())[task], output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["channel", "layer"])
def test_cross_stitch_mixes_the_maps_at_the_end_of_every_stage(per: str) -> None:
    model = model_of({"kind": "cross_stitch", "per": per}, TASKS["both"]).eval()
    assert isinstance(model, CrossStitch)
    tasks = ["kind", "age", "mask"]
    rows = [model.stitched.units["1"][task].weight for task in tasks]  # type: ignore[index, union-attr]
    torch.testing.assert_close(rows[0][:, 0], torch.tensor([0.9, 0.05, 0.05]))
    assert rows[0].shape == (3, 32 if per == "channel" else 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for row in [p for name, p in model.named_parameters() if "units" in name or "last" in name]:
            row.copy_(torch.rand(row.shape, generator=generator))
        x = [model.normalise(images())] * 3
        nets: list[Any] = [model.stitched.backbones[task] for task in tasks]
        # The forward of simple_cnn, whose stages end behind each activation and behind the last pooling.
        steps = {
            1: lambda net, x: net.conv1(x).relu(),
            2: lambda net, x: net.conv2(F.max_pool2d(x, 2)).relu(),
            4: lambda net, x: F.max_pool2d(x, 2),
        }
        for stride, step in steps.items():
            x = [step(net, own) for net, own in zip(nets, x, strict=True)]
            last = stride == 4
            alpha = [
                (model.last[task] if last else model.stitched.units[str(stride)][task]).weight  # type: ignore[index, union-attr]
                for task in tasks
            ]
            mixing = torch.stack([a.expand(-1, x[0].shape[1]) for a in alpha])
            x = list(torch.einsum("kjd,jbdhw->kbdhw", mixing, torch.stack(x)))
            inputs = model.head_inputs("mask", model.features(images()))
            torch.testing.assert_close(inputs[f"stride_{stride}"], x[2], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ with what else there is
@pytest.mark.parametrize("mode", ["stage", "block"])
@pytest.mark.parametrize("way", ["mmoe", "mtan", "cross_stitch"])
def test_checkpointing_changes_no_bit(way: str, mode: str) -> None:
    found = []
    for checkpointing in ("off", mode):
        model = model_of(way, TASKS["maps"], "squeezenet1_1", checkpointing=checkpointing)
        torch.stack(list(losses(model(images())).values())).sum().backward()
        state = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
        found.append(state)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["mmoe", "mtan", "cross_stitch"])
def test_frozen_backbones_keep_still_while_the_rest_trains(way: str) -> None:
    model = model_of(way, TASKS["vectors"], "mobilenet_v3_small", frozen=True).train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "backbone" in name}
    torch.stack(list(losses(model(images())).values())).sum().backward()
    assert all((p.grad is None) == ("backbone" in name) for name, p in model.named_parameters())
    assert before and all(torch.equal(model.get_buffer(name), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("way", ["mmoe", "mtan", "cross_stitch"])
def test_no_batch_norm_is_left_where_group_norm_is_asked_for(way: str) -> None:
    model = model_of(way, TASKS["both"], "resnet18", norm="group")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("way", ["separate", "cross_stitch", "mmoe", "mtan"])
def test_given_weights_are_in_every_backbone(way: str, tmp_path: Path) -> None:
    trained = model_of("hard", TASKS["vectors"], "squeezenet1_1")
    whole = {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save(whole, tmp_path / "model.pth")
    model = model_of(way, TASKS["vectors"], "squeezenet1_1", weights=str(tmp_path / "model.pth"))
    for backbone in model.all_backbones():
        own = backbone.state_dict()
        expected = trained.all_backbones()[0].state_dict()
        assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_stitches_have_a_rate_of_their_own_and_no_decay() -> None:
    model = model_of({"kind": "cross_stitch", "lr_factor": 100.0})
    settings = OptimSettings(lr=1e-3, backbone_lr=1e-4, layer_decay=0.5)
    groups = build_optimizer(settings, model, ["kind", "age", "mask"], []).param_groups
    rates = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates.keys() == set(model.parameters())
    stitches = [p for name, p in model.named_parameters() if "units" in name or "last" in name]
    assert {(round(rates[p][0], 9), rates[p][1]) for p in stitches} == {(0.1, 0.0)}
    convolutions = [net.conv1.weight for net in model.all_backbones()]  # type: ignore[union-attr]
    assert {rates[p][0] for p in convolutions} < {1e-4 * 0.5**n for n in range(1, 9)}  # type: ignore[index]


def test_experts_are_untrained_and_have_not_the_rate_of_the_backbone() -> None:
    model = model_of("mmoe")
    settings = OptimSettings(lr=1e-3, backbone_lr=1e-4)
    groups = build_optimizer(settings, model, ["kind", "age", "mask"], []).param_groups
    rates = {p: (group["name"], group["lr"]) for group in groups for p in group["params"]}
    assert {rates[p] for p in model.experts.parameters()} == {("sharing", 1e-3)}  # type: ignore[union-attr]
    assert {rates[p] for p in model.backbone.parameters()} == {("backbone", 1e-4)}  # type: ignore[union-attr]


def test_parts_are_counted_by_name() -> None:
    lines = describe(model_of("mmoe"), (32, 32)).splitlines()
    assert any(line.startswith("experts of stride_4: ") for line in lines)
    assert any(line.startswith("gate of kind: 256 parameters") for line in lines)
    assert "attention of mask: 2,208 parameters" in describe(model_of("mtan"), (32, 32)).splitlines()
    assert "last stitch of age: 192 parameters" in describe(model_of("cross_stitch"), (32, 32)).split("\n")


@pytest.mark.parametrize("way", ["mmoe", "mtan", "cross_stitch"])
def test_every_way_is_traced_as_one_graph(way: str) -> None:
    model = model_of(way).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"images_BCHW": {0: batch}}
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes)
    some = images(3)
    for task, output in program.module()(some).items():
        torch.testing.assert_close(output, model(some)[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["mmoe", "mtan", "cross_stitch"])
def test_channels_last_gives_the_same(way: str) -> None:
    model, other = model_of(way).eval(), model_of(way).eval()
    other.use_memory_format(torch.channels_last)
    with torch.no_grad():
        for task, output in other(images()).items():
            torch.testing.assert_close(output, model(images())[task], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("way", "specs", "backbone", "match"),
    [
        ("cross_stitch", [KIND], "simple_cnn", "two tasks or more, between whose .* found kind alone"),
        ("cross_stitch", [KIND, AGE], "timm/resnet10t", "with timm/resnet10t, whose stages cannot be run"),
        ("mmoe", [KIND], "simple_cnn", "two tasks or more whose heads read the same"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    way: str, specs: list[HeadSpec], backbone: str, match: str
) -> None:
    with pytest.raises(UserError, match=f"model.sharing: expected .*{match}"):
        model_of(way, specs, backbone)


def test_settings_are_checked_and_read_back() -> None:
    assert load_settings(ModelSettings, {"sharing": {"kind": "hard"}}) == load_settings(ModelSettings, {})
    settings = load_settings(ModelSettings, {"sharing": {"kind": "mmoe", "num_experts": 2}})
    assert "sharing: {kind: mmoe, num_experts: 2, width: null, kernel_size: 3}" in to_yaml(settings)
    for stated, match in (
        ({"kind": "mmoe", "experts": 2}, "experts: unknown key.*num_experts"),
        ({"kind": "hard", "num_experts": 2}, "sharing: expected no settings of hard, found num_experts"),
        ({"kind": "cross_stitch", "per": "chanel"}, "sharing.per: expected one of channel, layer.*chanel"),
        ("crossstitch", 'expected hard, .*cross_stitch.* found "crossstitch". Did you mean cross_stitch'),
    ):
        with pytest.raises(UserError, match=match):
            load_settings(ModelSettings, {"sharing": stated})
