"""Multi-gate mixture of experts (Ma et al. 2018, https://doi.org/10.1145/3219819.3220007).

Experts are shared and read the backbone's features; a task reads their sum, weighed by a gate of its own:

    f_k(x) = sum_n g_kn(x) E_n(x)        g_k(x) = softmax(W_k x)

An expert of a vector is a linear layer with ReLU, as in the paper; one of a map is a convolution with
normalisation and ReLU. The gates read the mean over the deepest map, or the vector. There are experts of the
features that two tasks or more read; what a single task reads comes as it is.

Parameters are named `backbone.<...>`, `experts.<feature>.<n>.<...>`, `gates.<task>.<...>`; features
`<feature>/expert_<n>`, and `pooled`, which the gates read.

Shape legend: batch.py; N experts.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.models.backbones import AnyBackbone
from mtl_dist.models.blueprint import Blueprint
from mtl_dist.models.features import VECTOR, map_key
from mtl_dist.models.multitask import FeatureDict, MultitaskModel, TaskModules
from mtl_dist.models.norms import make_norm
from mtl_dist.models.settings import DecoderNorm, Width

POOLED = "pooled"
"""The feature that the gates read, (B, D)."""


class MMoE(MultitaskModel):
    """Backbone and experts are shared, gates and heads the tasks' own.

    Args:
        num_experts: of each feature
        width: the channels of their outputs; None: those of the feature
        kernel_size: of an expert of a map

    Raises:
        UserError: no two tasks read the same feature.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        num_experts: Annotated[int, Field(ge=1)] = 4,
        width: Width | None = None,
        kernel_size: Literal[1, 3] = 3,
    ) -> None:
        super().__init__(blueprint.mean, blueprint.std)
        network = blueprint.network()
        strides = blueprint.strides_by_task(network.channels)
        of_vectors = all(spec.layout == "vector" for spec in blueprint.specs.values())
        wanted = set() if of_vectors else set[int]().union(*strides.values())
        self._source = VECTOR if of_vectors else map_key(max(wanted))
        reads = {
            task: [VECTOR] if of_vectors else [map_key(stride) for stride in sorted(own)]
            for task, own in strides.items()
        }
        counts = Counter(name for names in reads.values() for name in names)
        common = [name for name, count in counts.items() if count > 1]
        if not common:
            raise UserError(
                "model.sharing: expected two tasks or more whose heads read the same features, which the "
                f"experts of mmoe are for, found none among {', '.join(reads)}. Set it to hard."
            )
        sizes = {map_key(stride): channels for stride, channels in network.channels.items()}
        if of_vectors:
            sizes = {VECTOR: network.vector_size}
        outputs = {name: (width or size) if name in common else size for name, size in sizes.items()}
        channels = {stride: outputs.get(map_key(stride), 0) for stride in network.channels}
        heads = {task: blueprint.head(task, channels, outputs[self._source], self._source) for task in reads}
        kernel = None if of_vectors else kernel_size
        self.backbone = blueprint.backbone(network, wanted, of_vectors)
        self.experts = nn.ModuleDict(
            {
                name: Experts(sizes[name], outputs[name], num_experts, kernel, blueprint.norm)
                for name in common
            }
        )
        self.gates = TaskModules(
            {
                task: Gate(sizes[self._source], num_experts)
                for task, names in reads.items()
                if set(names) & set(common)
            }
        )
        self.heads = TaskModules(heads)
        self._lone = [name for name in counts if name not in common]
        self._names = {name: [f"{name}/expert_{n}" for n in range(num_experts)] for name in self.experts}

    def features(self, images_BCHW: Tensor) -> FeatureDict:
        found = self.backbone(self.normalise(images_BCHW))
        features = {name: found[name] for name in self._lone}
        for name, experts in self.experts.items():
            features |= zip(self._names[name], experts(found[name]), strict=True)
        source = found[self._source]
        # A tensor of its own in the graph: its gradient is that of the gates.
        features[POOLED] = source.mean(dim=(2, 3)) if source.dim() == 4 else source.view_as(source)
        return features

    def feature_names(self, task: str) -> tuple[str, ...]:
        names = [each for name in super().feature_names(task) for each in self._names.get(name, [name])]
        return (*names, *([POOLED] if task in self.gates else []))

    def head_inputs(self, task: str, features: FeatureDict) -> FeatureDict:
        if task not in self.gates:
            return super().head_inputs(task, features)
        gate_BN = self.gates[task](features[POOLED])
        return {
            name: _mixed(gate_BN, [features[each] for each in self._names[name]])
            if name in self._names
            else features[name]
            for name in super().feature_names(task)
        }

    def own_modules(self, task: str) -> list[nn.Module]:
        return [*([self.gates[task]] if task in self.gates else []), self.heads[task]]

    def all_backbones(self) -> list[AnyBackbone]:
        return [self.backbone]

    def trunk(self) -> dict[str, nn.Module]:
        experts = {f"experts of {name}": part for name, part in self.experts.items()}
        gates = {f"gate of {task}": gate for task, gate in self.gates.items()}
        return {"backbone": self.backbone, **experts, **gates}


class Experts(nn.ModuleList):
    """The experts of one feature: a vector of `size`, or a map of as many channels."""

    def __init__(
        self, size: int, width: int, num_experts: int, kernel_size: int | None, norm: DecoderNorm
    ) -> None:
        super().__init__(_expert(size, width, kernel_size, norm) for _ in range(num_experts))

    def forward(self, feature: Tensor) -> list[Tensor]:
        """The output of each expert, (B, width) or (B, width, H, W)."""
        return [expert(feature) for expert in self]


class Gate(nn.Module):
    """How much of each expert a task takes of each sample."""

    def __init__(self, size: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, num_experts, bias=False)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """The shares (B, N), float32 at least; those of a sample add up to 1."""
        logits_BN: Tensor = self.linear(pooled_BD)
        return logits_BN.softmax(dim=1, dtype=torch.promote_types(logits_BN.dtype, torch.float32))


def _expert(size: int, width: int, kernel_size: int | None, norm: DecoderNorm) -> nn.Sequential:
    if kernel_size is None:
        return nn.Sequential(nn.Linear(size, width), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(size, width, kernel_size, padding=kernel_size // 2, bias=False),
        make_norm(norm, width),
        nn.ReLU(),
    )


def _mixed(gate_BN: Tensor, outputs: list[Tensor]) -> Tensor:
    """The experts' outputs (B, ...), each times its share."""
    shape = (-1, *([1] * (outputs[0].dim() - 1)))
    shares = [share_B.view(shape).to(outputs[0].dtype) for share_B in gate_BN.unbind(1)]
    mixed = shares[0] * outputs[0]
    for share, output in zip(shares[1:], outputs[1:], strict=True):
        mixed = torch.addcmul(mixed, share, output)
    return mixed
