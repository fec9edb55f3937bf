"""The model: raw images in, one output per task out.

    images -> normalised -> backbone(s) -> features -> heads -> outputs

What the tasks share of it, and what is a task's own, is for the ways of sharing to say (`sharing/`). The
features are where the shared part meets the tasks' own: `features(images)` are exactly the tensors that
`heads_forward` reads, so `torch.autograd.grad(loss_k, list(features.values()))` is a task's gradient at the
features. Heads are named `heads.<task>.<...>`.

Shape legend: batch.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from mtl_dist.batch import Outputs
from mtl_dist.errors import UserError
from mtl_dist.models.backbones import AnyBackbone
from mtl_dist.plural import plural

FeatureDict: TypeAlias = dict[str, Tensor]
"""`vector` (B, D) and `stride_<s>` (B, D, H, W), as the way of sharing names them."""


ADAPTER_DROPOUT = "lora_dropout"
"""What drops values before an adapter of a frozen backbone, in training."""


class TaskModules(nn.ModuleDict):
    """One module per task, under any name without a dot: nn.ModuleDict itself refuses "type" or "values"."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        if "." in key or not key:
            raise UserError(f"tasks: expected a name without a dot, found {key!r}. Rename the task.")
        self._modules[key] = module


class MultitaskModel(nn.Module, ABC):
    """The model; each way of sharing is a class derived from it.

    Images are raw, as in a Batch: uint8 or float. The model normalises them with its buffers `mean` and
    `std`, which are in the images' own units (0 to 255 for 8-bit ones), and casts them to its parameters'
    type; autocast does the rest.

    A derived class makes its backbones and `heads`, gives `features`, and names the modules of a task alone
    (`own_modules`): all other parameters are shared. A module with parameters runs once in a forward, by its
    call: an engine may gather its weights around that.

    Args:
        mean, std: per channel
    """

    mean: Tensor
    std: Tensor
    heads: TaskModules
    heads_follow_features: ClassVar[bool] = True
    """Whether the parameters of one task alone lie behind the features, and the shared ones before them."""
    compared_at_features: ClassVar[bool] = True
    """Whether tasks meet at the features: their gradients there then show how they stand to one another."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.frozen = False
        self.memory_format = torch.preserve_format
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    @abstractmethod
    def features(self, images_BCHW: Tensor) -> FeatureDict:
        """The tensors where the shared part meets the tasks' own, of raw images."""

    @abstractmethod
    def all_backbones(self) -> list[AnyBackbone]:
        """The backbones."""

    @abstractmethod
    def trunk(self) -> dict[str, nn.Module]:
        """What lies before the heads, by what it is called; each is run by calling it."""

    def own_modules(self, task: str) -> list[nn.Module]:
        """The modules that this task's loss alone reaches."""
        return [self.heads[task]]

    def feature_names(self, task: str) -> tuple[str, ...]:
        """The features that the task's own part reads.

        Two tasks without a common one have no common gradient at the features: separate backbones, or
        simple_cnn's vector and map heads.
        """
        return tuple(self.heads[task].reads)  # type: ignore[arg-type]

    def head_inputs(self, task: str, features: FeatureDict) -> FeatureDict:
        """What the task's head reads, made of the features that the task reads."""
        return {name: features[name] for name in self.heads[task].reads}  # type: ignore[union-attr]

    def heads_forward(self, features: FeatureDict, image_size: tuple[int, int]) -> Outputs:
        """Every task's output from the features of images of `image_size` (H, W)."""
        return {task: self.head_forward(task, features, image_size) for task in self.heads}

    def head_forward(self, task: str, features: FeatureDict, image_size: tuple[int, int]) -> Tensor:
        """One task's output, (B, C) or (B, C, H, W) as its HeadSpec says."""
        output: Tensor = self.heads[task](self.head_inputs(task, features), image_size)
        return output

    def forward(self, images_BCHW: Tensor) -> Outputs:
        """Every task's output for raw images."""
        return self.heads_forward(self.features(images_BCHW), (images_BCHW.shape[2], images_BCHW.shape[3]))

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Raw images as the backbone takes them."""
        if images_BCHW.shape[1] != self.mean.shape[1]:
            raise UserError(
                f"images: expected {plural(self.mean.shape[1], 'channel')}, as the model was built for, "
                f"found {images_BCHW.shape[1]}. Convert them."
            )
        if self.memory_format is not torch.preserve_format:
            images_BCHW = images_BCHW.contiguous(memory_format=self.memory_format)
        centred_BCHW = images_BCHW - self.mean.float()
        return centred_BCHW.div_(self.std.float()).to(next(self.parameters()).dtype)

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters of this task alone."""
        return [parameter for module in self.own_modules(task) for parameter in module.parameters()]

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that more than one task reaches, frozen ones too."""
        own = {parameter for task in self.heads for parameter in self.task_parameters(task)}
        return [parameter for parameter in self.parameters() if parameter not in own]

    def backbone_layers(self) -> list[list[list[nn.Parameter]]]:
        """Of each backbone the parameters layer by layer, from the image on."""
        return [backbone.parameters_by_layer() for backbone in self.all_backbones()]

    def undecayed_parameters(self) -> set[nn.Parameter]:
        """Parameters of several dimensions on which weight decay does not act."""
        return {p for backbone in self.all_backbones() for p in backbone.undecayed()}

    def lr_factors(self) -> dict[nn.Parameter, float]:
        """What multiplies the learning rate of parameters that have one of their own."""
        return {}

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lay out weights, and from now on images and so all maps, in `memory_format`."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    def parts(self) -> list[nn.Module]:
        """What is run by calling it: all before the heads, and the heads."""
        return [*self.trunk().values(), *self.heads.values()]

    def freeze_backbones(self, keep: Callable[[str], bool] = lambda name: False) -> None:
        """The backbones keep their weights, and stay in evaluation mode when the rest trains; parameters of
        theirs whose names `keep` takes go on as they are."""
        self.frozen = True
        for backbone in self.all_backbones():
            for name, parameter in backbone.named_parameters():
                if not keep(name):
                    parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> MultitaskModel:
        """Training or evaluation mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for backbone in self.all_backbones():
                backbone.eval()
                for name, module in backbone.named_modules():
                    if name.endswith(f".{ADAPTER_DROPOUT}"):
                        module.train(mode)
        return self
