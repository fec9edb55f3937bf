"""What the small trainings of `tiny_balancing` learn: classes and numbers, or every kind of task at once.

Targets are drawn, so nothing can be learnt from the images; what is compared is how it is attempted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.specs import IGNORE, TaskInfo
from mtl_dist.tasks.registry import TaskSettings

TaskSet = Literal["classes and numbers", "all kinds"]


@dataclass(frozen=True)
class Work:
    """Tasks with what a dataset would know of them, the model and the size of the images.

    `targets(num, generator)` are those of so many samples, as if all had labels.
    """

    infos: Mapping[str, TaskInfo]
    settings: Mapping[str, TaskSettings]
    model: Mapping[str, object]
    size: int
    targets: Callable[[int, torch.Generator], dict[str, Tensor]]

    @property
    def sometimes_absent(self) -> list[str]:
        """Every third task."""
        return list(self.infos)[2::3]


# ------------------------------------------------------------------ classes and numbers
def _few_targets(num: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "kind": torch.randint(0, 3, (num,), generator=generator),
        "age": torch.randn(num, generator=generator) * 10 + 40,
        "tags": torch.randint(0, 2, (num, 2), generator=generator).float(),
    }


_FEW = {
    "kind": TaskInfo("classification", classes=("a", "b", "c"), num_labelled=9, class_counts=(3, 3, 3)),
    "age": TaskInfo("regression", num_labelled=9, mean=40.0, std=10.0),
    "tags": TaskInfo("multilabel", classes=("p", "q"), num_labelled=9, class_counts=(4, 5)),
}

# ------------------------------------------------------------------ every kind
SIZE = 16
_POINTS = ("left", "right", "top")
_NUMBERS = {"mean": [0.0] * 3, "std": [1.0] * 3, "minimum": [-3.0] * 3, "maximum": [3.0] * 3}
_ALL = {
    **_FEW,
    "spread": TaskInfo(
        "regression",
        num_labelled=9,
        mean=1.6,
        std=2.0,
        minimum=0.1,
        facts={"log_mean": 0.0, "log_std": 1.0},
    ),
    "grade": TaskInfo("ordinal", classes=("low", "mid", "high"), num_labelled=9, class_counts=(3, 3, 3)),
    "colour": TaskInfo("vector", classes=("red", "green", "blue"), num_labelled=9, facts=_NUMBERS),
    "things": TaskInfo(
        "segmentation", classes=("ground", "box", "ball"), num_labelled=9, class_counts=(9, 9, 9)
    ),
    "spots": TaskInfo("segmentation", classes=("ground", "spot"), num_labelled=9, class_counts=(9, 9)),
    "distance": TaskInfo("depth", num_labelled=9, mean=4.0, std=2.0, facts={"pixels": 99, "positive": 99}),
    "surface": TaskInfo("normals", num_labelled=9, facts={"pixels": 99, "mean": [0.0, 0.0, 1.0]}),
    "ends": TaskInfo("keypoints", classes=_POINTS, num_labelled=9),
    "marks": TaskInfo("keypoints", classes=_POINTS, num_labelled=9),
}
_ALL_SETTINGS: dict[str, dict[str, Any]] = {
    "age": {"loss": {"kind": "gaussian_nll", "floor": 0.5}},
    "spread": {"space": "log", "loss": {"kind": "quantile"}},
    "colour": {"loss": {"kind": "huber"}},
    "things": {"loss": {"kind": "cross_entropy", "boundary": {"width": 3}}},
    "spots": {"loss": {"kind": "bce_dice"}},
    "distance": {"loss": {"kind": "huber"}},
    "marks": {"head": "regression"},
}


class TwoStrides(nn.Module):
    """Two convolutions, whose last map all heads read; smooth, as the heads are: of a decoder's many ReLUs
    rounding takes one to its other side."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.activation = nn.SiLU()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The map (B, 16, H / 4, W / 4)."""
        half_BDHW = self.activation(self.norm(self.first(images_BCHW)))
        quarter_BDHW: Tensor = self.activation(self.second(half_BDHW))
        return quarter_BDHW


def _all_targets(num: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Of every kind; a fifth of the pixels and numbers, and a third of the points have none."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(num, *shape, generator=generator)

    def seldom(*shape: int) -> Tensor:
        return torch.rand(num, *shape, generator=generator) < 0.2

    def classes(number: int, *shape: int) -> Tensor:
        return torch.randint(0, number, (num, *shape), generator=generator)

    def points() -> Tensor:
        places_BK2 = drawn(len(_POINTS), 2).tanh()
        return F.pad(torch.cat([places_BK2, classes(3, len(_POINTS), 1)], dim=2), (0, 0, 0, 3))

    maps = (SIZE, SIZE)
    return {
        **_few_targets(num, generator),
        "spread": drawn().exp(),
        "grade": classes(3),
        "colour": drawn(3).masked_fill(seldom(3), torch.nan),
        "things": classes(3, *maps).masked_fill(seldom(*maps), IGNORE).byte(),
        "spots": classes(2, *maps).masked_fill(seldom(*maps), IGNORE).byte(),
        "distance": (drawn(*maps) * 2 + 4).masked_fill(seldom(*maps), torch.nan),
        "surface": F.normalize(drawn(3, *maps), dim=1).masked_fill(seldom(1, *maps), torch.nan),
        "ends": points(),
        "marks": points(),
    }


def _settings(infos: Mapping[str, TaskInfo], more: Mapping[str, Any]) -> dict[str, TaskSettings]:
    adapter: TypeAdapter[TaskSettings] = TypeAdapter(TaskSettings)
    return {
        name: adapter.validate_json(TypeAdapter(Any).dump_json({"kind": info.kind, **more.get(name, {})}))
        for name, info in infos.items()
    }


WORK: dict[TaskSet, Work] = {
    "classes and numbers": Work(_FEW, _settings(_FEW, {}), {"backbone": "simple_cnn"}, 8, _few_targets),
    "all kinds": Work(
        _ALL,
        _settings(_ALL, _ALL_SETTINGS),
        {"backbone": "tests.tiny_tasks.TwoStrides", "decoder": "linear"},
        SIZE,
        _all_targets,
    ),
}
