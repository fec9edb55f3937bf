"""Gradient checkpointing: the same numbers, computed twice and kept once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor

from mtl_dist.models.backbones import build_network
from mtl_dist.models.building import build_model
from mtl_dist.models.checkpointing import cut
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import Checkpointing, HeadSettings, ModelSettings
from mtl_dist.specs import HeadSpec

SPECS = [HeadSpec("kind", "vector", 3), HeadSpec("mask", "map", 2)]
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def model_of(name: str, checkpointing: Checkpointing, **options: Any) -> MultitaskModel:
    torch.manual_seed(0)
    settings = ModelSettings(
        backbone=name, checkpointing=checkpointing, head=HeadSettings(dropout=0.5, hidden=(8,)), **options
    )
    return build_model(settings, SPECS, 3, (32, 32))


def losses(model: MultitaskModel) -> list[Tensor]:
    torch.manual_seed(7)
    outputs = model(IMAGES)
    return [outputs["kind"].square().mean(), outputs["mask"].sigmoid().mean()]


def state_after_two_steps(model: MultitaskModel) -> dict[str, Tensor]:
    """Losses, gradients, per-task gradients at the shared part, and buffers."""
    found: dict[str, Tensor] = {}
    for step in range(2):
        model.zero_grad()
        both = losses(model)
        shared = [p for p in model.shared_parameters() if p.requires_grad]
        for task, loss in enumerate(both):
            gradients = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            found |= {f"{step} task {task} {i}": g for i, g in enumerate(gradients) if g is not None}
        torch.stack(both).sum().backward()
        found[f"{step} losses"] = torch.stack(both).detach()
        found |= {f"{step} {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        found |= {f"{step} {k}": b.clone() for k, b in model.named_buffers()}
    return found


@pytest.mark.parametrize(
    ("name", "mode"),
    [("simple_cnn", "stage"), ("resnet18", "stage"), ("resnet18", "block"), ("efficientnet_b0", "block")],
)
def test_losses_gradients_and_statistics_are_equal_bit_for_bit(name: str, mode: Checkpointing) -> None:
    plain = state_after_two_steps(model_of(name, "off"))
    checkpointed = state_after_two_steps(model_of(name, mode))
    assert plain.keys() == checkpointed.keys()
    assert [key for key in plain if not torch.equal(plain[key], checkpointed[key])] == []


def test_stochastic_depth_of_a_transformer_draws_the_same_again() -> None:
    def gradients(mode: Checkpointing) -> list[Tensor]:
        model = model_of("swin_t", mode)
        return list(torch.autograd.grad(torch.stack(losses(model)).sum(), model.shared_parameters()))

    assert all(torch.equal(a, b) for a, b in zip(gradients("off"), gradients("block"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "stage", "block"])
def test_the_compiled_model_is_one_graph_with_the_same_numbers(mode: Checkpointing) -> None:
    torch._dynamo.reset()
    model, plain = model_of("resnet18", mode), model_of("resnet18", "off")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run, own in ((compiled, model), (plain, plain)):
        own.heads.eval()
        torch.stack([output.square().mean() for output in run(IMAGES).values()]).sum().backward()
        assert int(own.get_buffer("backbone.bn1.num_batches_tracked")) == 1
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, a), (_, b) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def calls_of_a_block(model: MultitaskModel, train: bool) -> int:
    calls: list[int] = []
    model.train(train)
    model.get_submodule("backbone.layer2.1").register_forward_pre_hook(lambda *_: calls.append(1))
    both = losses(model)
    if train and both[0].requires_grad:
        torch.stack(both).sum().backward()
    return len(calls)


def test_a_block_is_computed_twice_only_where_gradients_need_it() -> None:
    assert calls_of_a_block(model_of("resnet18", "off"), train=True) == 1
    assert calls_of_a_block(model_of("resnet18", "stage"), train=True) == 2
    assert calls_of_a_block(model_of("resnet18", "block"), train=True) == 2
    assert calls_of_a_block(model_of("resnet18", "block", frozen=True), train=True) == 1
    with torch.no_grad():
        assert calls_of_a_block(model_of("resnet18", "block"), train=False) == 1


def saved_bytes(model: MultitaskModel) -> int:
    """The bytes that the graph holds on to after the forward pass, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses(model)
    return sum(sizes.values())


def test_smaller_pieces_keep_less_in_memory() -> None:
    off = saved_bytes(model_of("efficientnet_b0", "off"))
    assert saved_bytes(model_of("efficientnet_b0", "stage")) < 0.7 * off
    assert saved_bytes(model_of("efficientnet_b0", "block")) < 0.7 * off


def test_segments_end_at_stages_and_blocks() -> None:
    network = build_network(ModelSettings(), 3, (32, 32))
    traced = network.trace
    steps = traced.steps[:-2]
    result = [traced.deepest.step]

    def lasts(mode: Checkpointing) -> list[str]:
        return [segment.steps[-1].name for segment in cut(network.module, steps, traced.stages, result, mode)]

    assert lasts("off") == ["layer4_1"]
    assert lasts("stage") == ["relu", "layer1_1", "layer2_1", "layer3_1", "layer4_1"]
    blocks = [f"layer{layer}_{block}" for layer in (1, 2, 3, 4) for block in (0, 1)]
    assert lasts("block") == ["relu", "maxpool", *blocks]


def test_a_transformer_of_one_stage_is_cut_into_four_parts() -> None:
    with init_empty_weights(include_buffers=False):
        network = build_network(ModelSettings(backbone="vit_b_32"), 3, (32, 32))
    traced = network.trace
    segments = cut(network.module, traced.steps, traced.stages, [traced.deepest.step], "stage")
    ends = [segment.steps[-1].name for segment in segments]
    assert ends[:3] == [f"encoder_layers_encoder_layer_{index}" for index in (2, 5, 8)]
