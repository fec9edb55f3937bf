"""The model: raw images in, one output per task out.

    images -> normalised -> backbone(s) -> features -> heads -> outputs

The features are where the shared part meets the heads: `features(images)` are exactly the tensors that
`heads_forward` reads, so `torch.autograd.grad(loss_k, list(features.values()))` is a task's gradient at the
features. Parameters are named `backbone.<torchvision's name>`, or `backbones.<task>.<...>` where backbones
are not shared, and `heads.<task>.<...>`.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from mtl_dist.batch import Outputs
from mtl_dist.errors import UserError
from mtl_dist.models.backbones import (
    AnyBackbone,
    AnyNetwork,
    build_network,
    make_backbone,
    published_normalisation,
)
from mtl_dist.models.features import VECTOR
from mtl_dist.models.heads import Head, build_head, check_heads, used_strides
from mtl_dist.models.norms import convert_norms
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import HeadSpec

FeatureDict: TypeAlias = dict[str, Tensor]
"""`vector` (B, D) and `stride_<s>` (B, D, H, W); with separate backbones `<task>/vector` and so on."""


Measured: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel."""


class TaskModules(nn.ModuleDict):
    """One module per task, under any name without a dot: nn.ModuleDict itself refuses "type" or "values"."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        if "." in key or not key:
            raise UserError(f"tasks: expected a name without a dot, found {key!r}. Rename the task.")
        self._modules[key] = module


class MultitaskModel(nn.Module):
    """A backbone, shared or one per task, and a head per task.

    Images are raw, as in a Batch: uint8 or float. The model normalises them with its buffers `mean` and
    `std`, which are in the images' own units (0 to 255 for 8-bit ones), and casts them to its parameters'
    type; autocast does the rest.

    Args:
        backbones: the one backbone, or one for every task
        heads: by task
        mean, std: per channel
        frozen: the backbones keep their weights, and stay in evaluation mode when the heads train
    """

    mean: Tensor
    std: Tensor
    heads_follow_features: ClassVar[bool] = True
    """Whether the parameters of one task alone lie behind the features, and the shared ones before them."""

    def __init__(
        self,
        backbones: AnyBackbone | Mapping[str, AnyBackbone],
        heads: Mapping[str, Head],
        mean: Sequence[float],
        std: Sequence[float],
        frozen: bool,
    ) -> None:
        super().__init__()
        self.backbone = None if isinstance(backbones, Mapping) else backbones
        self.backbones = TaskModules(backbones) if isinstance(backbones, Mapping) else None
        self.heads = TaskModules(heads)
        self.frozen = frozen
        self.memory_format = torch.preserve_format
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        if frozen:
            for backbone in self._all_backbones():
                backbone.requires_grad_(False)
        self.train()

    def features(self, images_BCHW: Tensor) -> FeatureDict:
        """The tensors where the backbone meets the heads, of raw images."""
        normalised_BCHW = self.normalise(images_BCHW)
        if self.backbone is not None:
            return self.backbone(normalised_BCHW)
        return {
            f"{task}/{name}": feature
            for task, backbone in self._own_backbones().items()
            for name, feature in backbone(normalised_BCHW).items()
        }

    def heads_forward(self, features: FeatureDict, image_size: tuple[int, int]) -> Outputs:
        """Every task's output from the features of images of `image_size` (H, W)."""
        return {task: self.head_forward(task, features, image_size) for task in self.heads}

    def head_forward(self, task: str, features: FeatureDict, image_size: tuple[int, int]) -> Tensor:
        """One task's output, (B, C) or (B, C, H, W) as its HeadSpec says."""
        prefix = "" if self.backbone is not None else f"{task}/"
        own = {name: features[prefix + name] for name in self.heads[task].reads}  # type: ignore[union-attr]
        return self.heads[task](own, image_size)

    def forward(self, images_BCHW: Tensor) -> Outputs:
        """Every task's output for raw images."""
        return self.heads_forward(self.features(images_BCHW), (images_BCHW.shape[2], images_BCHW.shape[3]))

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Raw images as the backbone takes them."""
        if images_BCHW.shape[1] != self.mean.shape[1]:
            raise UserError(
                f"images: expected {self.mean.shape[1]} channels, as the model was built for, "
                f"found {images_BCHW.shape[1]}. Convert them."
            )
        if self.memory_format is not torch.preserve_format:
            images_BCHW = images_BCHW.contiguous(memory_format=self.memory_format)
        centred_BCHW = images_BCHW - self.mean.float()
        return centred_BCHW.div_(self.std.float()).to(next(self.parameters()).dtype)

    def feature_names(self, task: str) -> tuple[str, ...]:
        """The features that the task's head reads.

        Two tasks without a common one have no common gradient at the features: separate backbones, or
        simple_cnn's vector and map heads.
        """
        prefix = "" if self.backbone is not None else f"{task}/"
        return tuple(prefix + name for name in self.heads[task].reads)  # type: ignore[union-attr]

    def shared_parameters(self) -> list[nn.Parameter]:
        """The shared backbone's parameters, frozen ones too; none with separate backbones."""
        return [] if self.backbone is None else list(self.backbone.parameters())

    def backbone_layers(self) -> list[list[list[nn.Parameter]]]:
        """Of each backbone the parameters layer by layer, from the image on."""
        return [backbone.parameters_by_layer() for backbone in self._all_backbones()]

    def undecayed_parameters(self) -> set[nn.Parameter]:
        """Parameters of several dimensions on which weight decay does not act."""
        return {p for backbone in self._all_backbones() for p in backbone.undecayed()}

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lay out weights, and from now on images and so all maps, in `memory_format`."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    def parts(self) -> list[nn.Module]:
        """The backbones and heads."""
        return [*self._all_backbones(), *self.heads.values()]

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters of this task alone: its head's, and its backbone's where that is its own."""
        own = [] if self.backbones is None else list(self.backbones[task].parameters())
        return own + list(self.heads[task].parameters())

    def train(self, mode: bool = True) -> MultitaskModel:
        """Training or evaluation mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for backbone in self._all_backbones():
                backbone.eval()
        return self

    def _own_backbones(self) -> dict[str, AnyBackbone]:
        return {} if self.backbones is None else dict(self.backbones.items())  # type: ignore[arg-type]

    def _all_backbones(self) -> list[AnyBackbone]:
        return [self.backbone] if self.backbone is not None else list(self._own_backbones().values())


def build_model(
    settings: ModelSettings,
    heads: Sequence[HeadSpec],
    in_channels: int,
    image_size: tuple[int, int],
    *,
    measured: Measured | None = None,
    is_picture: bool = True,
) -> MultitaskModel:
    """The model for these heads and images, in training mode, on the CPU.

    `measured` are mean and deviation of the training images, `is_picture` whether these are 8-bit RGB.

    Untrained weights are drawn from torch's global generator: seed it first.

    Raises:
        UserError: settings that don't fit the tasks, the backbone or the images.
    """
    if not heads:
        raise UserError("tasks: expected at least one task, found none. Give the model something to learn.")
    check_heads(settings, heads)
    mean, std = normalisation(settings, in_channels, measured, is_picture)
    modules: dict[str, Head] = {}
    if settings.shared:
        shared = _build_part(settings, heads, build_network(settings, in_channels, image_size), modules)
        model = MultitaskModel(shared, modules, mean, std, settings.frozen)
    else:
        separate = {
            spec.task: _build_part(
                settings, [spec], build_network(settings, in_channels, image_size), modules
            )
            for spec in heads
        }
        model = MultitaskModel(separate, modules, mean, std, settings.frozen)
    if settings.norm == "sync":
        convert_norms(model, "sync")
    return model


def _build_part(
    settings: ModelSettings, specs: Sequence[HeadSpec], network: AnyNetwork, heads: dict[str, Head]
) -> AnyBackbone:
    """Cut a backbone for `specs` from the network, and put their heads into `heads`."""
    strides = {stride for spec in specs for stride in used_strides(settings, spec, network.channels)}
    vector_name = network.vector_name(with_maps=bool(strides))
    has_vector_head = any(spec.layout == "vector" for spec in specs)
    for spec in specs:
        heads[spec.task] = build_head(settings, spec, network, vector_name)
    return make_backbone(network, strides, has_vector_head and vector_name == VECTOR, settings)


def normalisation(
    settings: ModelSettings, in_channels: int, measured: Measured | None, is_picture: bool
) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel, as `model.normalise` and what stands beside it say.

    Raises:
        UserError: they want what was not measured, or do not fit the channels.
    """
    mean, std = published_normalisation(settings.backbone_name, in_channels)
    if settings.normalise == "data" and measured is None:
        raise UserError(
            "model.normalise: expected auto or published for data whose pixels were not measured, found "
            "data. Prepare it again, or state model.mean and model.std."
        )
    if measured is not None and (
        settings.normalise == "data" or (settings.normalise == "auto" and not is_picture)
    ):
        mean = list(measured[0])
        std = [deviation or 1.0 for deviation in measured[1]]  # a channel of one value becomes 0
    return (
        _per_channel("mean", settings.mean, mean, in_channels),
        _per_channel("std", settings.std, std, in_channels),
    )


def _per_channel(
    name: str, given: tuple[float, ...] | None, default: list[float], in_channels: int
) -> list[float]:
    if given is None:
        return default
    if len(given) not in (1, in_channels):
        raise UserError(
            f"model.{name}: expected 1 value or {in_channels}, one per channel, found {len(given)}. "
            "Correct the list."
        )
    return list(given) * (in_channels // len(given))
