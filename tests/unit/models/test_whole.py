"""Whole models of the user's: what is shared is found, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtl_dist.config.loading import load_settings
from mtl_dist.errors import UserError
from mtl_dist.models.describe import describe
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.whole import model_of
from mtl_dist.specs import HeadSpec

SPECS = [HeadSpec("a", "vector", 3), HeadSpec("b", "vector", 2), HeadSpec("c", "map", 1)]


class Branching(nn.Module):
    """`early` serves all tasks, `late` a and b; each task has a layer of its own."""

    def __init__(
        self, in_channels, outputs, unused: bool = False, missing: str = "", plain: bool = False
    ) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.late = nn.Linear(4, 5)
        self.a, self.b = nn.Linear(5, outputs["a"]), nn.Linear(5, outputs["b"])
        self.c = nn.Conv2d(4, outputs["c"], 1)
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)
        if unused:
            self.idle = nn.Linear(2, 2)
        self.missing, self.plain = missing, plain

    def forward(self, images: Tensor) -> object:
        maps = self.early(images)
        vector = self.late(maps.mean((2, 3))) * self.fixed
        outputs = {"a": self.a(vector), "b": self.b(vector), "c": self.c(maps), "more": vector}
        outputs.pop(self.missing, None)
        return tuple(outputs.values()) if self.plain else outputs


class Narrow(Branching):
    def forward(self, images: Tensor) -> object:
        outputs = super().forward(images)
        assert isinstance(outputs, dict)
        return {**outputs, "b": outputs["b"][:, :1]}


def settings(kind: str = "Branching", **values: object) -> ModelSettings:
    return load_settings(ModelSettings, {"network": {"kind": f"{__name__}.{kind}", **values}})


def build(kind: str = "Branching", **values: object) -> MultitaskModel:
    torch.manual_seed(0)
    return model_of(settings(kind, **values), SPECS, 3, (8, 8))


def names(model: MultitaskModel, parameters: list[nn.Parameter]) -> set[str]:
    of = {parameter: name for name, parameter in model.named_parameters()}
    return {of[parameter].removeprefix("network.").partition(".")[0] for parameter in parameters}


def test_what_the_outputs_of_two_tasks_reach_is_shared_and_the_rest_a_tasks_own() -> None:
    model = build()
    assert names(model, model.shared_parameters()) == {"early", "late", "fixed"}
    assert {task: names(model, model.task_parameters(task)) for task in "abc"} == {t: {t} for t in "abc"}


def test_looking_for_it_leaves_buffers_and_the_global_generator_alone() -> None:
    model = build()
    assert float(model.network.early[1].running_mean.abs().sum()) == 0  # type: ignore[union-attr, operator]
    assert int(model.network.early[1].num_batches_tracked) == 0  # type: ignore[union-attr, arg-type]
    state = torch.get_rng_state()
    model_of(settings(), SPECS, 3, (8, 8))
    after_building = torch.get_rng_state()
    torch.set_rng_state(state)
    Branching(3, {"a": 3, "b": 2, "c": 1})
    assert torch.equal(torch.get_rng_state(), after_building)


def test_it_answers_as_a_model_of_the_package_does() -> None:
    model = build()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    outputs = model(images)
    assert {task: tuple(output.shape) for task, output in outputs.items()} == {
        "a": (2, 3),
        "b": (2, 2),
        "c": (2, 1, 8, 8),
    }
    assert "in all: " in describe(model, (8, 8))


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("Branching", {"unused": True}, r"some task reaches, found idle.weight, idle.bias. Remove them"),
        ("Branching", {"missing": "b"}, r"an output of every task, found none of b among a, c, more"),
        ("Branching", {"plain": True}, r"outputs by task \(a, b, c\), found tuple. Return a dictionary"),
        ("Narrow", {}, r"an output \(B, 2\) of b, found \(2, 1\)"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(kind: str, values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=f"model.network: expected .*{said}"):
        build(kind, **values)


@pytest.mark.parametrize(
    "other",
    [{"backbone": "resnet34"}, {"frozen": True}, {"heads": {"a": {"dropout": 0.5}}}, {"norm": "group"}],
)
def test_beside_a_whole_model_there_is_no_backbone_and_no_head(other: dict[str, object]) -> None:
    name = next(iter(other))
    with pytest.raises(UserError, match=f"{name}: expected none with model.network"):
        load_settings(ModelSettings, {"network": {"kind": f"{__name__}.Branching"}, **other})
