"""One backbone for all tasks, and a head for each (Caruana 1997, https://doi.org/10.1023/A:1007379606734).

Parameters are named `backbone.<the library's name>` and `heads.<task>.<...>`.

Shape legend: batch.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from mtl_dist.models.backbones import AnyBackbone
from mtl_dist.models.blueprint import Blueprint
from mtl_dist.models.multitask import FeatureDict, MultitaskModel, TaskModules


class Hard(MultitaskModel):
    """The backbone is shared; the heads read its features."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__(blueprint.mean, blueprint.std)
        backbone, heads = blueprint.cut(blueprint.network(), blueprint.tasks)
        self.backbone = backbone
        self.heads = TaskModules(heads)

    def features(self, images_BCHW: Tensor) -> FeatureDict:
        features: FeatureDict = self.backbone(self.normalise(images_BCHW))
        return features

    def all_backbones(self) -> list[AnyBackbone]:
        return [self.backbone]

    def trunk(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone}
