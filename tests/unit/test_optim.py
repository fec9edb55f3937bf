"""Optimizers touch what they should, and schedules are pure functions of the step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_dist.config.loading import load_settings, to_yaml
from mtl_dist.engine.engine import put_slot, stored_slots
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import ModelSettings
from mtl_dist.optim import (
    CosineSchedule,
    LearningRateSchedule,
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


# ---------------------------------------------------------------- optimizers and schedules by import path
class Growing(LearningRateSchedule):
    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    def factor(self, progress: float, epoch: int) -> float:
        return progress**self.power


class Lion(torch.optim.Optimizer):
    """Its step counter is a plain number."""

    def __init__(self, params: Any, lr: float = 1e-4, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(steps=0, average=torch.zeros_like(parameter), nothing=None)
                state["steps"] += 1
                state["average"].lerp_(parameter.grad, 1 - group["beta"] ** state["steps"])
                parameter.add_(state["average"].sign(), alpha=-group["lr"])


class Counting(Lion):
    """Keeps state in its groups."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.param_groups[0]["beta"] *= 0.99


class Decaying(Lion):
    """Moves what has no gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


class Weightless(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None: ...


ELEMENTWISE = ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "AdamW", "SGD"]
PATHS = [f"torch.optim.{name}" for name in [*ELEMENTWISE, "Adafactor"]] + [f"{__name__}.Lion"]


def optim(**values: Any) -> OptimSettings:
    return load_settings(OptimSettings, values)


@pytest.mark.parametrize("path", PATHS)
def test_an_optimizer_by_import_path_goes_on_from_its_stored_state_as_if_it_had_not_stopped(
    model: MultitaskModel, path: str
) -> None:
    decay = 0.0 if path.endswith(("Rprop", "ASGD")) else 0.01
    settings = optim(kind=path, lr=0.01, weight_decay=decay)
    if path == "torch.optim.Rprop":  # it has no weight decay
        settings = optim(kind=path, lr=0.01, weight_decay=0)
    resumed = copy.deepcopy(model)

    def steps(of: MultitaskModel, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter in of.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    first = build_optimizer(settings, model, TASKS, [])
    steps(model, first, range(3))
    second = build_optimizer(settings, resumed, TASKS, [])
    resumed.load_state_dict(model.state_dict())
    for parameter, other in zip(model.parameters(), resumed.parameters(), strict=True):
        for slot, value in stored_slots(first.state[parameter]).items():
            put_slot(second.state[other], slot, value.clone())
    steps(model, first, range(3, 6))
    steps(resumed, second, range(3, 6))
    for parameter, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_whether_an_optimizer_may_be_divided_over_ranks_is_found_by_trying() -> None:
    divided = {path: optim(kind=path, weight_decay=0).is_elementwise for path in PATHS}
    assert divided == {path: not path.endswith("Adafactor") for path in PATHS}
    assert OptimSettings().is_elementwise
    if hasattr(torch.optim, "Muon"):
        assert not optim(kind="torch.optim.Muon").is_elementwise


def test_the_groups_have_their_rates_and_decays_under_any_optimizer(model: MultitaskModel) -> None:
    settings = optim(
        kind="torch.optim.NAdam", lr=0.02, backbone_lr=0.1, task_lr={"age": 0.3}, weight_decay=0.4
    )
    optimizer = build_optimizer(settings, model, TASKS, [])
    assert isinstance(optimizer, torch.optim.NAdam)
    assert learning_rates(optimizer) == {"backbone": 0.1, "kind": 0.02, "age": 0.3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.4}


def test_all_arguments_of_an_optimizer_are_stated_and_read_back(tmp_path: Path) -> None:
    settings = optim(kind="torch.optim.NAdam", arguments={"betas": [0.8, 0.9]})
    assert settings.arguments["betas"] == [0.8, 0.9]
    assert settings.arguments["momentum_decay"] == 4e-3
    (tmp_path / "optim.yaml").write_text(to_yaml(settings))
    assert load_settings(OptimSettings, tmp_path / "optim.yaml") == settings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"kind": "adamm"},
            "kind: expected a known optimizer or an import path, found adamm. Did you mean adam",
        ),
        (
            {"kind": "torch.optim.Nadam"},
            "expected a class Nadam in torch.optim, found none. Did you mean NAdam",
        ),
        (
            {"kind": "torch.nn.Linear"},
            "kind: expected a subclass of torch.optim.Optimizer, found torch.nn.Linear",
        ),
        ({"kind": "torch.optim.LBFGS"}, "expected an optimizer whose step takes no closure"),
        (
            {"kind": "torch.optim.NAdam", "arguments": {"momentum_decy": 1}},
            "expected arguments of torch.optim.NAdam, found momentum_decy. Did you mean momentum_decay",
        ),
        ({"kind": "torch.optim.NAdam", "arguments": {"lr": 1}}, "expected lr in `optim` itself"),
        (
            {"kind": "torch.optim.NAdam", "betas": [0.8, 0.9]},
            r"betas: expected none with .*NAdam, found .*Move it to",
        ),
        (
            {"kind": "sgd", "betas": [0.8, 0.9]},
            r"betas: expected none with sgd, found .*Remove it",
        ),
        ({"kind": "adamw", "arguments": {"eps": 1}}, "arguments: expected none with adamw"),
        (
            {"schedule": {"kind": f"{__name__}.Growing", "powr": 1}},
            r"unknown key for kind .*Growing. Did you mean power",
        ),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_while_the_recipe_is_read(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        optim(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": f"{__name__}.Counting"}, "Counting, which keeps beta in its groups"),
        ({"kind": f"{__name__}.Decaying"}, "leaves parameters without a gradient as they are"),
        (
            {"kind": f"{__name__}.Weightless"},
            r"weight_decay: expected 0 with .*Weightless, which has no weight",
        ),
        ({"kind": "torch.optim.NAdam", "arguments": {"betas": [2, 3]}}, "NAdam cannot be built"),
        ({"kind": "torch.optim.SparseAdam", "weight_decay": 0}, "SparseAdam fails on a made matrix"),
    ],
)
def test_an_optimizer_that_would_go_wrong_later_is_refused_when_it_is_built(
    model: MultitaskModel, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        build_optimizer(optim(**values), model, TASKS, [])


def test_a_schedule_by_import_path_is_a_function_of_the_progress() -> None:
    settings = optim(schedule={"kind": f"{__name__}.Growing", "power": 3})
    assert learning_rate_factor(settings, 5, 10, 0, 1.0) == 0.125
    assert optim(schedule=f"{__name__}.Growing").schedule.model_dump()["power"] == 2.0


def test_zero_refuses_by_name_an_optimizer_that_looks_at_whole_parameters() -> None:
    from mtl_dist.assemble import check_device
    from mtl_dist.engine.connect import EngineChoice
    from mtl_dist.recipe import Recipe

    stated = {"tasks": {"a": {"kind": "regression"}}, "data": {"train": [{"path": "x"}], "image_size": 8}}
    host = torch.device("cpu")
    whole, alike = (
        load_settings(Recipe, {**stated, "optim": {"kind": f"torch.optim.{name}"}})
        for name in ("Adafactor", "NAdam")
    )
    with pytest.raises(
        UserError, match=r"optim.kind: .* under ZeRO 1, .* found torch.optim.Adafactor. Use DDP"
    ):
        check_device(whole, host, EngineChoice("deepspeed", 1))
    for recipe, choice in ((whole, EngineChoice("deepspeed", 0)), (alike, EngineChoice("deepspeed", 3))):
        check_device(recipe, host, choice)
    check_device(whole, host, EngineChoice("accelerate"))
