"""Cross-stitch networks (Misra et al. 2016, https://arxiv.org/abs/1604.03539).

Each task has a backbone; at the end of every stage (the last map at each stride) the T maps are mixed, and
each backbone goes on from its own mixture, which the task's head reads too:

    x'_k = sum_j a_kj x_j        a number a_kj for each channel, or one for the stage

At first a_kk is `own_weight`, and the other tasks share the rest. So every backbone is reached by every task
and is shared; of a task alone are its head and its row of the last stitch. The paper trains the stitches at
100 to 1,000 times the rate of the network, with plain SGD: `lr_factor`, 1 as it stands, for AdamW moves each
number by about the rate in a step anyhow. The features are the mixed maps that heads read and, at the deepest
stride, the maps before the last stitch. Tasks meet before these too: their gradients are compared at the
parameters.

Parameters are named `stitched.backbones.<task>.<the library's name>`,
`stitched.units.<stride>.<task>.weight`, `last.<task>.weight` and `heads.<task>.<...>`.

Shape legend: batch.py; T tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.models.backbones import AnyBackbone, Backbone, Network
from mtl_dist.models.blueprint import Blueprint
from mtl_dist.models.features import Wanted, map_key
from mtl_dist.models.multitask import FeatureDict, MultitaskModel, TaskModules
from mtl_dist.models.settings import PositiveFloat


class CrossStitch(MultitaskModel):
    """Backbones and stitches are shared, but for the last stitch, of which each task has its row.

    Args:
        per: whether each channel of a stage has numbers of its own, or the stage one for each pair of tasks
        own_weight: of a task's own map at first
        lr_factor: what multiplies the learning rate of the stitches

    Raises:
        UserError: there is one task alone, or a backbone of timm, whose stages cannot be run one by one.
    """

    compared_at_features: ClassVar[bool] = False

    def __init__(
        self,
        blueprint: Blueprint,
        per: Literal["channel", "layer"] = "channel",
        own_weight: Annotated[float, Field(gt=0, le=1)] = 0.9,
        lr_factor: PositiveFloat = 1.0,
    ) -> None:
        super().__init__(blueprint.mean, blueprint.std)
        tasks = blueprint.tasks
        if len(tasks) < 2:
            raise UserError(
                "model.sharing: expected two tasks or more, between whose backbones cross_stitch lies, found "
                f"{tasks[0]} alone. Set it to hard."
            )
        networks = [blueprint.network() for _ in tasks]
        channels = networks[0].channels
        strides = blueprint.strides_by_task(channels)
        wanted = set[int]().union(*strides.values())
        deepest = max(wanted)
        source = map_key(max(channels))
        heads = {task: blueprint.head(task, channels, channels[max(channels)], source) for task in tasks}
        backbones = {
            task: _in_stages(network, wanted, blueprint)
            for task, network in zip(tasks, networks, strict=True)
        }
        passed = [stage.stride for stage in backbones[tasks[0]].stages if stage.stride < deepest]

        def rows(stride: int, of: Iterable[str]) -> TaskModules:
            size = channels[stride] if per == "channel" else 1
            return TaskModules({task: Row(len(tasks), tasks.index(task), size, own_weight) for task in of})

        units = {str(stride): rows(stride, tasks) for stride in passed}
        self.stitched = Stitched(backbones, units)
        self.last = rows(deepest, [task for task in tasks if deepest in strides[task]])
        self.heads = TaskModules(heads)
        self._lr_factor = lr_factor
        self._deepest = map_key(deepest)

    def features(self, images_BCHW: Tensor) -> FeatureDict:
        found: FeatureDict = self.stitched(self.normalise(images_BCHW))
        read = {name for task in self.heads for name in self.feature_names(task)}
        return {name: feature for name, feature in found.items() if name in read}

    def feature_names(self, task: str) -> tuple[str, ...]:
        own = [f"{task}/{name}" for name in super().feature_names(task) if name != self._deepest]
        return (*own, *(self._unmixed if task in self.last else ()))

    def head_inputs(self, task: str, features: FeatureDict) -> FeatureDict:
        names = [name for name in super().feature_names(task) if name != self._deepest]
        inputs = {name: features[f"{task}/{name}"] for name in names}
        if task in self.last:
            inputs[self._deepest] = self.last[task]([features[name] for name in self._unmixed], 1)
        return inputs

    def own_modules(self, task: str) -> list[nn.Module]:
        return [*([self.last[task]] if task in self.last else []), self.heads[task]]

    def all_backbones(self) -> list[AnyBackbone]:
        return list(self.stitched.backbones.values())  # type: ignore[arg-type]

    def trunk(self) -> dict[str, nn.Module]:
        last = {f"last stitch of {task}": row for task, row in self.last.items()}
        return {"backbones and stitches": self.stitched, **last}

    def undecayed_parameters(self) -> set[nn.Parameter]:
        return super().undecayed_parameters() | set(self._stitches())

    def lr_factors(self) -> dict[nn.Parameter, float]:
        return dict.fromkeys(self._stitches(), self._lr_factor)

    def _stitches(self) -> list[nn.Parameter]:
        return [*self.stitched.units.parameters(), *self.last.parameters()]

    @property
    def _unmixed(self) -> tuple[str, ...]:
        """The features that the last stitch mixes."""
        return tuple(f"{task}/{self._deepest}" for task in self.heads)


class Stitched(nn.Module):
    """A backbone for each task, run side by side, and what mixes their maps between the stages."""

    def __init__(self, backbones: Mapping[str, Backbone], units: Mapping[str, TaskModules]) -> None:
        super().__init__()
        self.backbones = TaskModules(backbones)
        self.units = nn.ModuleDict(units)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The features of normalised images, as `<task>/stride_<s>`."""
        backbones: dict[str, Backbone] = dict(self.backbones.items())  # type: ignore[arg-type]
        values = {task: backbone.start(images_BCHW) for task, backbone in backbones.items()}
        first = next(iter(backbones.values()))
        for number in range(first.num_segments):
            for task, backbone in backbones.items():
                backbone.advance(values[task], number)
            stage = first.stage_after(number)
            if stage is None or str(stage.stride) not in self.units:
                continue
            maps = [values[task][stage.step] for task in backbones]
            rows = self.units[str(stage.stride)]
            axis = 1 if stage.layout == "nchw" else -1
            for task, row in rows.items():  # type: ignore[operator]
                values[task][stage.step] = row(maps, axis)
        return {
            f"{task}/{name}": feature
            for task, backbone in backbones.items()
            for name, feature in backbone.finish(values[task]).items()
        }


class Row(nn.Module):
    """One task's mixture of the maps of all: `weight` (T, C), or (T, 1)."""

    def __init__(self, num_tasks: int, own: int, size: int, own_weight: float) -> None:
        super().__init__()
        weight = torch.full((num_tasks, size), (1 - own_weight) / (num_tasks - 1))
        weight[own] = own_weight
        self.weight = nn.Parameter(weight)

    def forward(self, maps: Sequence[Tensor], axis: int) -> Tensor:
        """The sum of the maps, each times its weights along `axis`, where the channels are."""
        shape = [1] * maps[0].dim()
        shape[axis] = -1
        weights = [weight.view(shape).to(maps[0].dtype) for weight in self.weight]
        mixed = weights[0] * maps[0]
        for weight, other in zip(weights[1:], maps[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, other)
        return mixed


def _in_stages(network: object, strides: set[int], blueprint: Blueprint) -> Backbone:
    if not isinstance(network, Network):
        raise UserError(
            "model.sharing: expected hard, separate, mtan or mmoe with "
            f"{blueprint.settings.backbone_name}, whose stages cannot be run one by one, found cross_stitch. "
            "Change it, or take a backbone of torchvision."
        )
    return Backbone(network, Wanted(frozenset(strides)), False, blueprint.settings, in_stages=True)
