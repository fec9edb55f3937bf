"""A whole model of the user's: images in, one output per task out.

Which parameters the tasks share is found by asking autograd: a parameter that the outputs of two tasks reach
is shared, one that a single task reaches is that task's own.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtl_dist.config.describe import listed
from mtl_dist.errors import UserError
from mtl_dist.models.backbones import AnyBackbone
from mtl_dist.models.building import Measured, build_model, normalisation
from mtl_dist.models.multitask import FeatureDict, MultitaskModel, TaskModules
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import HeadSpec


class WholeModel(MultitaskModel):
    """The user's network in the place of backbone and heads; its outputs are the features, and the heads hand
    them on.

    Raises:
        UserError: it returns something else than an output per task, or has parameters that no task reaches.
    """

    heads_follow_features = False

    def __init__(
        self,
        network: nn.Module,
        specs: Sequence[HeadSpec],
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(mean, std)
        self.heads = TaskModules({})
        self.network = network
        self._specs = {spec.task: spec for spec in specs}
        self._reached = self._reach(image_size)

    def features(self, images_BCHW: Tensor) -> FeatureDict:
        outputs = self.network(self.normalise(images_BCHW))
        if not isinstance(outputs, Mapping):
            raise UserError(
                f"model.network: expected outputs by task ({', '.join(self._specs)}), found "
                f"{type(outputs).__name__}. Return a dictionary."
            )
        missing = [task for task in self._specs if task not in outputs]
        if missing:
            raise UserError(
                f"model.network: expected an output of every task, found none of {', '.join(missing)} among "
                f"{listed([str(name) for name in outputs])}."
            )
        return {task: self._checked(task, outputs[task]) for task in self._specs}

    def heads_forward(self, features: FeatureDict, image_size: tuple[int, int]) -> dict[str, Tensor]:
        return dict(features)

    def head_forward(self, task: str, features: FeatureDict, image_size: tuple[int, int]) -> Tensor:
        return features[task]

    def feature_names(self, task: str) -> tuple[str, ...]:
        return (task,)

    def shared_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if len(self._reached[p]) != 1]

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if self._reached[p] == {task}]

    def all_backbones(self) -> list[AnyBackbone]:
        return []

    def trunk(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def _checked(self, task: str, output: Tensor) -> Tensor:
        spec = self._specs[task]
        rank, wanted = (4, "(B, {}, h, w)") if spec.layout == "map" else (2, "(B, {})")
        if output.dim() != rank or output.shape[1] != spec.num_outputs:
            raise UserError(
                f"model.network: expected an output {wanted.format(spec.num_outputs)} of {task}, found "
                f"{tuple(output.shape)}. The constructor's `outputs` says how many each task wants."
            )
        return output

    def _reach(self, image_size: tuple[int, int]) -> dict[nn.Parameter, set[str]]:
        """By parameter, the tasks whose output depends on it; of a frozen one none."""
        training = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not training:
            raise UserError("model.network: expected parameters that train, found none.")
        reached: dict[nn.Parameter, set[str]] = {p: set() for p in self.network.parameters()}
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            images = self.mean + self.std * torch.randn(2, self.mean.shape[1], *image_size)
            outputs = self.features(images)
            for task, output in outputs.items():
                if not output.requires_grad:
                    raise UserError(f"model.network: expected parameters that train for {task}, found none.")
                found = torch.autograd.grad(
                    output.float().sum(), list(training.values()), allow_unused=True, retain_graph=True
                )
                for parameter, gradient in zip(training.values(), found, strict=True):
                    if gradient is not None:
                        reached[parameter].add(task)
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                buffer.copy_(buffers[name])
        unused = [name for name, parameter in training.items() if not reached[parameter]]
        if unused:
            raise UserError(
                f"model.network: expected parameters that the output of some task reaches, found "
                f"{listed(unused)}. Remove them, or set their requires_grad to False."
            )
        return reached


def model_of(
    settings: ModelSettings,
    heads: Sequence[HeadSpec],
    in_channels: int,
    image_size: tuple[int, int],
    *,
    measured: Measured | None = None,
    is_picture: bool = True,
) -> MultitaskModel:
    """The model that the settings mean: the user's whole one, or backbone and heads (`build_model`).

    Raises:
        UserError: settings or a network that do not fit the tasks or the images.
    """
    if settings.network is None:
        return build_model(settings, heads, in_channels, image_size, measured=measured, is_picture=is_picture)
    outputs = {spec.task: spec.num_outputs for spec in heads}
    network = settings.network.make(in_channels=in_channels, image_size=image_size, outputs=outputs)
    mean, std = normalisation(settings, in_channels, measured, is_picture)
    return WholeModel(network, heads, image_size, mean, std)
