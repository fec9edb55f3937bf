"""A backbone for each task: nothing is shared, as if each task had a model of its own.

Parameters are named `backbones.<task>.<the library's name>` and `heads.<task>.<...>`, features
`<task>/vector`, `<task>/stride_8` and so on.

Shape legend: batch.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from mtl_dist.models.backbones import AnyBackbone
from mtl_dist.models.blueprint import Blueprint
from mtl_dist.models.heads import Head
from mtl_dist.models.multitask import FeatureDict, MultitaskModel, TaskModules


class Separate(MultitaskModel):
    """Backbone and head are a task's own."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__(blueprint.mean, blueprint.std)
        backbones: dict[str, AnyBackbone] = {}
        heads: dict[str, Head] = {}
        for task in blueprint.tasks:
            backbones[task], own = blueprint.cut(blueprint.network(), [task])
            heads |= own
        self.backbones = TaskModules(backbones)
        self.heads = TaskModules(heads)

    def features(self, images_BCHW: Tensor) -> FeatureDict:
        normalised_BCHW = self.normalise(images_BCHW)
        return {
            f"{task}/{name}": feature
            for task, backbone in self.backbones.items()
            for name, feature in backbone(normalised_BCHW).items()
        }

    def feature_names(self, task: str) -> tuple[str, ...]:
        return tuple(f"{task}/{name}" for name in super().feature_names(task))

    def head_inputs(self, task: str, features: FeatureDict) -> FeatureDict:
        return {name: features[f"{task}/{name}"] for name in super().feature_names(task)}

    def own_modules(self, task: str) -> list[nn.Module]:
        return [self.backbones[task], self.heads[task]]

    def all_backbones(self) -> list[AnyBackbone]:
        return list(self.backbones.values())  # type: ignore[arg-type]

    def trunk(self) -> dict[str, nn.Module]:
        return {f"backbone of {task}": backbone for task, backbone in self.backbones.items()}
