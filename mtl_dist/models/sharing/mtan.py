"""Multi-task attention network (Liu, Johns and Davison 2019, https://arxiv.org/abs/1803.10704).

One backbone is shared; each task has an attention module on each of its stages, from stride 4 on. With p_j
the backbone's map at stage j, the task reads the masked maps q_j:

    a_j = sigmoid(h_j(g_j([p_j; pool(f_j(q_(j-1)))])))        q_j = a_j * p_j

g and h are 1x1 convolutions with normalisation, f is a bottleneck of 1x1, 3x3 and 1x1 ones, as the authors
have for ResNets; a vector head reads the mean over the deepest q_j. Where we differ: a stage gives its last
map alone (the paper merges the first and masks the last one), and f, which the paper shares among the tasks
behind their masks, is each task's own. So all that is shared lies before the backbone's maps, all that is a
task's own behind them, and balancing at the features is exact.

Parameters are named `backbone.<...>`, `attention.<task>.<...>` and `heads.<task>.<...>`.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.models.backbones import AnyBackbone
from mtl_dist.models.blueprint import Blueprint
from mtl_dist.models.features import map_key
from mtl_dist.models.multitask import FeatureDict, MultitaskModel, TaskModules
from mtl_dist.models.norms import make_norm
from mtl_dist.models.settings import DecoderNorm, Width

LEAST_STRIDE = 4
"""Of the maps that are masked; a backbone whose maps are all finer has all of them masked."""


class MTAN(MultitaskModel):
    """The backbone is shared, attention modules and heads are the tasks' own.

    Args:
        reduction: what the channels of a stage are divided by inside its attention module
    """

    def __init__(self, blueprint: Blueprint, reduction: Width = 4) -> None:
        super().__init__(blueprint.mean, blueprint.std)
        network = blueprint.network()
        channels = network.channels
        strides = blueprint.strides_by_task(channels)
        source = map_key(max(channels))
        heads = {task: blueprint.head(task, channels, channels[max(channels)], source) for task in strides}
        masked = {task: _masked(channels, max(own)) for task, own in strides.items()}
        self._reads = {
            task: tuple(map_key(stride) for stride in sorted(own | set(masked[task])))
            for task, own in strides.items()
        }
        wanted = {stride for task, own in strides.items() for stride in (*own, *masked[task])}
        self.backbone = blueprint.backbone(network, wanted, vector=False)
        self.attention = TaskModules(
            {
                task: Attention({s: channels[s] for s in own}, reduction, blueprint.norm)
                for task, own in masked.items()
            }
        )
        self.heads = TaskModules(heads)

    def features(self, images_BCHW: Tensor) -> FeatureDict:
        features: FeatureDict = self.backbone(self.normalise(images_BCHW))
        return features

    def feature_names(self, task: str) -> tuple[str, ...]:
        return self._reads[task]

    def head_inputs(self, task: str, features: FeatureDict) -> FeatureDict:
        masked = self.attention[task]({name: features[name] for name in self._reads[task]})
        return super().head_inputs(task, masked)

    def own_modules(self, task: str) -> list[nn.Module]:
        return [self.attention[task], self.heads[task]]

    def all_backbones(self) -> list[AnyBackbone]:
        return [self.backbone]

    def trunk(self) -> dict[str, nn.Module]:
        attention = {f"attention of {task}": part for task, part in self.attention.items()}
        return {"backbone": self.backbone, **attention}


class Attention(nn.Module):
    """One task's attention modules over maps of `channels` by stride."""

    def __init__(self, channels: Mapping[int, int], reduction: int, norm: DecoderNorm) -> None:
        super().__init__()
        self._strides = sorted(channels)
        self.masks = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        before = 0
        for stride in self._strides:
            own = channels[stride]
            inner = max(own // reduction, 1)
            if before:
                self.encoders[str(stride)] = nn.Sequential(
                    *_layer(before, inner, 1, norm),
                    nn.ReLU(),
                    *_layer(inner, inner, 3, norm),
                    nn.ReLU(),
                    *_layer(inner, own, 1, norm),
                    nn.ReLU(),
                )
            self.masks[str(stride)] = nn.Sequential(
                *_layer(own * (2 if before else 1), inner, 1, norm),
                nn.ReLU(),
                *_layer(inner, own, 1, norm),
                nn.Sigmoid(),
            )
            before = own

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The maps, those of its strides masked."""
        masked = dict(maps)
        for number, stride in enumerate(self._strides):
            map_BDhw = joined = maps[map_key(stride)]
            if number:
                finer = self._strides[number - 1]
                encoded = self.encoders[str(stride)](masked[map_key(finer)])
                joined = torch.cat([map_BDhw, _pooled(encoded, stride // finer, map_BDhw)], dim=1)
            masked[map_key(stride)] = self.masks[str(stride)](joined) * map_BDhw
        return masked


def _masked(channels: Mapping[int, int], deepest: int) -> list[int]:
    """The strides of the maps that are masked for a task whose deepest map has this one."""
    up_to = sorted(stride for stride in channels if stride <= deepest)
    return [stride for stride in up_to if stride >= LEAST_STRIDE] or up_to


def _pooled(map_BDhw: Tensor, factor: int, target: Tensor) -> Tensor:
    """The map at the size of `target`, a `factor` coarser."""
    pooled = F.max_pool2d(map_BDhw, factor, ceil_mode=True)
    # A stage without padding ends a row or a column short of that.
    return F.interpolate(pooled, size=target.shape[2:], mode="nearest")


def _layer(before: int, after: int, kernel_size: int, norm: DecoderNorm) -> Sequence[nn.Module]:
    conv = nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2, bias=False)
    return conv, make_norm(norm, after)
