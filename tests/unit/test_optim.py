"""Optimizers touch what they should, and schedules are pure functions of the step."""

from __future__ import annotations

import copy

import pytest
import torch

from mtl_dist.errors import UserError
from mtl_dist.models.multitask import MultitaskModel, build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.optim import (
    CosineSchedule,
    OneCycleSchedule,
    OptimSettings,
    StepSchedule,
    build_optimizer,
    learning_rate_factor,
    learning_rates,
    set_learning_rate,
)
from mtl_dist.specs import HeadSpec

TASKS = ["kind", "age"]


@pytest.fixture
def model() -> MultitaskModel:
    torch.manual_seed(0)
    heads = [HeadSpec("kind", "vector", 3), HeadSpec("age", "vector", 1)]
    return build_model(ModelSettings(backbone="simple_cnn"), heads, 1, (8, 8))


def test_every_trainable_parameter_is_in_exactly_one_group(model: MultitaskModel) -> None:
    optimizer = build_optimizer(OptimSettings(), model, TASKS, [])
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_parts_have_their_own_rates_and_one_factor_scales_them_all(model: MultitaskModel) -> None:
    settings = OptimSettings(lr=1e-2, backbone_lr=1e-3, task_lr={"age": 1e-4})
    optimizer = build_optimizer(settings, model, TASKS, [])
    assert learning_rates(optimizer) == {"backbone": 1e-3, "kind": 1e-2, "age": 1e-4}
    set_learning_rate(optimizer, 0.5)
    assert learning_rates(optimizer) == {"backbone": 5e-4, "kind": 5e-3, "age": 5e-5}


def test_biases_are_not_decayed_unless_asked(model: MultitaskModel) -> None:
    for decay_norms in (False, True):
        optimizer = build_optimizer(
            OptimSettings(weight_decay=0.1, decay_norms=decay_norms), model, TASKS, []
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert (group["weight_decay"] > 0) == (parameter.ndim > 1 or decay_norms)


def test_a_frozen_backbone_is_left_out(model: MultitaskModel) -> None:
    for parameter in model.shared_parameters():
        parameter.requires_grad_(False)
    optimizer = build_optimizer(OptimSettings(), model, TASKS, [])
    assert set(learning_rates(optimizer)) == set(TASKS)


def test_an_unknown_task_in_task_lr_is_named(model: MultitaskModel) -> None:
    with pytest.raises(UserError, match=r"optim\.task_lr\.weight"):
        build_optimizer(OptimSettings(task_lr={"weight": 1e-3}), model, TASKS, [])


def factor(settings: OptimSettings, step: int, total: int = 100, epoch: int = 0) -> float:
    return learning_rate_factor(settings, step, total, epoch, plateau=1.0)


def test_schedules_start_and_end_where_they_say() -> None:
    cosine = OptimSettings(schedule=CosineSchedule(final=0.1))
    assert factor(cosine, 0) == 1.0
    assert factor(cosine, 100) == pytest.approx(0.1)
    assert factor(cosine, 50) == pytest.approx(0.55)
    cycle = OptimSettings(schedule=OneCycleSchedule(peak=0.3, start_div=25, final_div=1e4))
    assert factor(cycle, 0) == pytest.approx(1 / 25)
    assert factor(cycle, 30) == pytest.approx(1.0)
    assert factor(cycle, 100) == pytest.approx(1e-4)
    steps = OptimSettings(schedule=StepSchedule(every=2, gamma=0.5))
    assert [factor(steps, 0, epoch=epoch) for epoch in range(5)] == [1, 1, 0.5, 0.5, 0.25]


def test_warm_up_rises_to_the_schedule_in_equal_steps() -> None:
    settings = OptimSettings(warmup_steps=4, schedule=StepSchedule())
    assert [factor(settings, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_each_kind_lowers_a_loss(model: MultitaskModel, kind: str) -> None:
    optimizer = build_optimizer(OptimSettings(kind=kind, lr=1e-3), model.eval(), TASKS, [])
    images = torch.rand(4, 1, 8, 8) * 255
    losses = []
    for _ in range(5):
        loss = (model(images)["age"] - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_fused_kernel_moves_every_weight_as_the_plain_one_does(
    model: MultitaskModel, memory_format: torch.memory_format
) -> None:
    model.use_memory_format(memory_format)
    other = copy.deepcopy(model)
    # A large `eps`: AdamW would make a whole step of a gradient that is 0 but for rounding.
    settings = OptimSettings(lr=1e-2, eps=1e-3)
    fused = build_optimizer(settings, model.eval(), TASKS, [])
    plain = torch.optim.AdamW(other.eval().parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0, fused=False)
    for group in fused.param_groups:
        group["weight_decay"] = 0.0
    images = torch.rand(4, 1, 8, 8) * 255
    for _ in range(3):
        for each, optimizer in ((model, fused), (other, plain)):
            outputs = each(images)
            (outputs["age"].square().mean() + outputs["kind"].square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-5, atol=1e-6, msg=name)
