"""Backbones: any classification model of torchvision or timm, or `simple_cnn`, as the maps that heads read.

A backbone's map at stride s is the last one of about 1/s of the image's height and width, as (B, D, H, W); s
is 1, 2, 4, 8, 16 or 32, as far as the network has them. Its vector is the mean over the deepest map; a ViT
has that one map, its patch tokens without the class token; `simple_cnn` has a hidden layer of its own.
Classifiers, auxiliary heads and whatever no head needs are dropped. Parameters keep torchvision's names.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torchvision
from torch import Tensor, is_grad_enabled, nn
from torch.fx.proxy import TraceError

from mtl_dist.errors import UserError
from mtl_dist.models.checkpointing import Segment, cut, recomputed
from mtl_dist.models.features import VECTOR, Blocks, Wanted, map_key
from mtl_dist.models.norms import convert_norms
from mtl_dist.models.settings import (
    SIMPLE_CNN,
    Checkpointing,
    ModelSettings,
    UserBackboneSettings,
    unknown_backbone,
)
from mtl_dist.models.simple_cnn import SimpleCNN
from mtl_dist.models.timm_backbone import TimmBackbone
from mtl_dist.models.timm_library import configuration, is_timm, normalisation_of
from mtl_dist.models.timm_network import TimmNetwork, build_timm_network, not_dilated
from mtl_dist.models.tracing import Stage, Trace, Values, needed_steps, run_step, step_shapes, trace
from mtl_dist.models.weights import input_convolution, load_weights

IMAGENET_CHANNELS = 3

_PROBE_SIZE = (512, 832)
"""Large enough that borders don't blur the strides, and of a shape by which no layout is mistaken."""


def backbone_names() -> list[str]:
    """Every name that `model.backbone` may be."""
    return [SIMPLE_CNN, *torchvision.models.list_models(module=torchvision.models)]


def check_backbone(settings: ModelSettings) -> None:
    """Refuse a name that no backbone has, before anything is built or waits in a queue for it.

    Raises:
        UserError: there is no such network; it is one of timm, which is not installed.
    """
    name = settings.backbone_name
    if is_timm(name):
        configuration(name)
    elif (
        settings.network is None
        and settings.user_backbone is None
        and (problem := unknown_backbone(name, backbone_names()[1:]))
    ):
        raise UserError(f"model.backbone: {problem}")


@dataclass(frozen=True)
class Network:
    """A whole network, traced: what heads are planned on and a `Backbone` is cut from.

    `fixed_size` is the one image size (H, W) it takes; None where it takes any.
    """

    module: nn.Module
    trace: Trace
    fixed_size: tuple[int, int] | None

    @property
    def channels(self) -> dict[int, int]:
        """The channels of the map at each stride."""
        return {stride: stage.channels for stride, stage in self.trace.stages.items()}

    @property
    def vector_size(self) -> int:
        """The channels of the vector."""
        return self.trace.vector_size

    @property
    def blocks(self) -> Blocks | None:
        """What it can give of each of its blocks: nothing, as it is cut at strides."""
        return None

    def vector_name(self, with_maps: bool) -> str:
        """The feature that the vector comes from: the deepest map where maps are wanted too.

        Vector and map heads then meet the backbone at one tensor, so that their gradients there can be
        compared. A network with a vector of its own (simple_cnn) gives that beside the maps.
        """
        pooled_by_heads = with_maps and self.trace.vector_step is None
        return map_key(self.trace.deepest.stride) if pooled_by_heads else VECTOR


def build_network(settings: ModelSettings, in_channels: int, image_size: tuple[int, int]) -> AnyNetwork:
    """The network that `settings.backbone` names, with its weights loaded and its norms converted.

    Raises:
        UserError: no such network, weights that don't fit it, or images of a size it doesn't take.
    """
    check_backbone(settings)
    name = settings.backbone_name
    if is_timm(name):
        return build_timm_network(settings, in_channels, image_size)
    if settings.user_backbone is not None:
        network = _own_network(settings.user_backbone, in_channels, image_size)
        if settings.weights == "torchvision":
            raise UserError(f"model.weights: expected a file or null for {name}, found torchvision.")
    elif name == SIMPLE_CNN:
        if settings.weights == "torchvision":
            raise UserError("model.weights: simple_cnn has no weights in torchvision. Give a file, or null.")
        network = _traced(SimpleCNN(in_channels, image_size), in_channels, image_size, has_classifier=False)
    else:
        module, fixed_size = _construct(name, image_size, settings.output_stride)
        _adapt_input(module, in_channels)
        network = _traced(module, in_channels, fixed_size, has_classifier=True)
        _check_size(network, name, in_channels, image_size)
    if settings.weights is not None:
        load_weights(network.module, {step.part for step in network.trace.steps}, name, settings.weights)
    convert_norms(network.module, settings.norm)
    return network


def _own_network(settings: UserBackboneSettings, in_channels: int, image_size: tuple[int, int]) -> Network:
    """The user's network, whose output is a vector, or a map that is averaged to one."""
    module = settings.make(in_channels=in_channels, image_size=image_size)
    fixed_size = image_size if "image_size" in settings.arguments else None
    try:
        network = _traced(module, in_channels, fixed_size, has_classifier=False)
    except (TraceError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.backbone: expected a forward of {settings.path} that torch.fx can trace, for images "
            f"(B, {in_channels}, H, W), found: {reason}. Put what depends on values into modules of its own."
        ) from None
    _check_size(network, settings.path, in_channels, image_size)
    return network


def published_normalisation(name: str, in_channels: int) -> tuple[list[float], list[float]]:
    """The mean and standard deviation, in 0 to 255, that the network's published weights expect.

    timm knows its own. Without three channels: 127.5 and 127.5. So also for googlenet and inception_v3,
    whose published models turn ImageNet's normalisation into that one themselves.
    """
    half = [127.5] * in_channels
    if is_timm(name) and in_channels == IMAGENET_CHANNELS:
        return normalisation_of(name)
    of_torchvision = name in torchvision.models.list_models(module=torchvision.models)
    if in_channels != IMAGENET_CHANNELS or (of_torchvision and _family(name) in ("googlenet", "inception")):
        return half, half
    published = name if of_torchvision else "resnet18"
    preset = torchvision.models.get_model_weights(published).DEFAULT.transforms()
    return [255.0 * value for value in preset.mean], [255.0 * value for value in preset.std]


class Backbone(nn.Module):
    """The part of a network that gives the wanted features.

    Args:
        network: the traced network; its submodules move in here
        wanted: the maps
        vector: whether the vector is wanted, beside the maps or alone
        settings: which say what is computed again in the backward pass
        in_stages: whether it can be run a stage at a time, by `start`, `advance` and `finish`
    """

    def __init__(
        self,
        network: Network,
        wanted: Wanted,
        vector: bool,
        settings: ModelSettings,
        in_stages: bool = False,
    ) -> None:
        super().__init__()
        traced = network.trace
        self._input = traced.input
        self._stages = [traced.stages[stride] for stride in sorted(wanted.strides)]
        self._vector_step = traced.vector_step if vector else None
        self._pooled = traced.deepest if vector and traced.vector_step is None else None
        results = [stage.step for stage in self._stages]
        results += [self._vector_step] if self._vector_step else []
        results += [self._pooled.step] if self._pooled else []
        steps = needed_steps(traced.steps, results)
        self._fixed_size = network.fixed_size
        self._recompute = settings.checkpointing != "off"
        mode: Checkpointing = "stage" if in_stages and not self._recompute else settings.checkpointing
        self._segments = cut(network.module, steps, traced.stages, results, mode)
        ends = {stage.step: stage for stage in traced.stages.values()}
        self._ends = [ends.get(segment.steps[-1].name) for segment in self._segments]
        self._blocks = cut(network.module, steps, traced.stages, results, "block")
        _move_parts(network.module, self, {step.part for step in steps})

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the features that `forward` gives."""
        vector = (VECTOR,) if self._vector_step or self._pooled else ()
        return (*vector, *(map_key(stage.stride) for stage in self._stages))

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The features of normalised images: `vector` (B, D) and `stride_<s>` (B, D, H, W), as wanted."""
        values = self.start(images_BCHW)
        for number in range(self.num_segments):
            self.advance(values, number)
        return self.finish(values)

    @property
    def num_segments(self) -> int:
        """In how many pieces it runs."""
        return len(self._segments)

    @property
    def stages(self) -> list[Stage]:
        """The stages that it goes through, in order."""
        return [stage for stage in self._ends if stage is not None]

    def stage_after(self, number: int) -> Stage | None:
        """The stage whose last map a piece ends with, if it does."""
        return self._ends[number]

    def start(self, images_BCHW: Tensor) -> Values:
        """The values before the first piece, of normalised images."""
        if self._fixed_size is not None and tuple(images_BCHW.shape[2:]) != self._fixed_size:
            raise UserError(
                f"images: expected {_pixels(self._fixed_size)}, the size that this backbone was built for, "
                f"found {_pixels(tuple(images_BCHW.shape[2:]))}. Resize them."
            )
        return {self._input: images_BCHW}

    def advance(self, values: Values, number: int) -> None:
        """Run a piece: what it gives comes into `values`, what no later one needs leaves them."""
        segment = self._segments[number]
        recompute = self._recompute and is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        inputs = [values[name] for name in segment.inputs]
        run = partial(self._run, segment)
        outputs = recomputed(run, inputs, self._parts(segment)) if recompute else run(*inputs)
        values.update(zip(segment.outputs, outputs, strict=True))
        for name in segment.last_used:
            del values[name]

    def finish(self, values: Values) -> dict[str, Tensor]:
        """The features, from the values after the last piece."""
        features = {map_key(stage.stride): stage.to_map(values[stage.step]) for stage in self._stages}
        if self._vector_step is not None:
            features[VECTOR] = values[self._vector_step]
        if self._pooled is not None:
            features[VECTOR] = self._pooled.to_map(values[self._pooled.step]).mean(dim=(2, 3))
        return features

    def parameters_by_layer(self) -> list[list[nn.Parameter]]:
        """The parameters layer by layer, from the image on: a block is one, and what lies between two."""
        seen: set[nn.Parameter] = set()
        layers = []
        for segment in self._blocks:
            names = [str(step.target) for step in segment.steps if step.part]
            own = [p for name, p in self.named_parameters() if _lies_in(name, names) and p not in seen]
            seen.update(own)
            layers.append(own)
        return [layer for layer in layers if layer]

    def undecayed(self) -> set[nn.Parameter]:
        """The parameters of several dimensions that are not decayed: none."""
        return set()

    def _run(self, segment: Segment, *inputs: Any) -> tuple[Any, ...]:
        values: Values = dict(zip(segment.inputs, inputs, strict=True))
        for step in segment.steps:
            values[step.name] = run_step(self, step, values)
            for name in segment.dead_after.get(step.name, ()):
                del values[name]
        return tuple(values[name] for name in segment.outputs)

    def _parts(self, segment: Segment) -> list[nn.Module]:
        return [self.get_submodule(str(step.target)) for step in segment.steps if step.kind == "module"]


AnyNetwork: TypeAlias = Network | TimmNetwork
AnyBackbone: TypeAlias = Backbone | TimmBackbone


def make_backbone(network: AnyNetwork, wanted: Wanted, vector: bool, settings: ModelSettings) -> AnyBackbone:
    """The part of a network that gives the wanted features; the network's submodules move in there."""
    if isinstance(network, TimmNetwork):
        return TimmBackbone(network, wanted, vector, settings)
    return Backbone(network, wanted, vector, settings)


def _construct(
    name: str, image_size: tuple[int, int], output_stride: int | None
) -> tuple[nn.Module, tuple[int, int] | None]:
    """A torchvision model and, where it takes only one, its image size."""
    arguments: dict[str, Any] = {}
    fixed_size: tuple[int, int] | None = None
    match _family(name):
        case "vision_transformer":
            if image_size[0] != image_size[1]:
                raise UserError(
                    f"model.backbone: {name} expected square images, found {_pixels(image_size)}. "
                    "Change data.image_size."
                )
            arguments, fixed_size = {"image_size": image_size[0]}, image_size
        case "maxvit":
            arguments, fixed_size = {"input_size": image_size}, image_size
        case "googlenet" | "inception":
            arguments = {"aux_logits": False, "init_weights": True}
    if output_stride is not None:
        arguments |= _dilated(name, output_stride)
    try:
        return torchvision.models.get_model(name, weights=None, **arguments), fixed_size
    except NotImplementedError:  # torchvision's small ResNets
        raise UserError(not_dilated(name, output_stride)) from None
    except (AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.backbone: {name} can't be built for images of {_pixels(image_size)} ({reason}). "
            "Change data.image_size: a multiple of the patch for vit, of 224 for maxvit."
        ) from None


def _dilated(name: str, output_stride: int) -> dict[str, Any]:
    """The arguments by which torchvision dilates a network."""
    match _family(name), output_stride:
        case "resnet", _:
            return {"replace_stride_with_dilation": [False, output_stride == 8, True]}
        case "mobilenetv3", 16:
            return {"dilated": True}
    raise UserError(not_dilated(name, output_stride))


def _family(name: str) -> str:
    """The torchvision module that defines the model."""
    return str(torchvision.models.get_model_builder(name).__module__).rpartition(".")[2]


def _adapt_input(module: nn.Module, in_channels: int) -> None:
    """Give an untrained network a first convolution for `in_channels`, its weights' size kept."""
    path, conv = input_convolution(module)
    if conv.in_channels == in_channels:
        return
    adapted = nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    deviation = float(conv.weight.detach().std()) * (conv.in_channels / in_channels) ** 0.5
    nn.init.normal_(adapted.weight, std=deviation)
    if conv.bias is not None:
        adapted.bias = conv.bias
    module.set_submodule(path, adapted)


def _traced(
    module: nn.Module, in_channels: int, fixed_size: tuple[int, int] | None, *, has_classifier: bool
) -> Network:
    traced = trace(module, in_channels, fixed_size or _PROBE_SIZE, has_classifier=has_classifier)
    return Network(module, traced, fixed_size)


def _check_size(network: Network, name: str, in_channels: int, image_size: tuple[int, int]) -> None:
    traced = network.trace
    steps = needed_steps(traced.steps, [traced.deepest.step])
    try:
        step_shapes(network.module, traced.input, steps, (in_channels, *image_size))
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model.backbone: {name} doesn't take images of {_pixels(image_size)} ({reason}). "
            "Choose a larger data.image_size or another backbone."
        ) from None


def _move_parts(source: nn.Module, target: nn.Module, names: Collection[str]) -> None:
    for name, child in source.named_children():
        if name in names:
            target.add_module(name, child)
    for name, parameter in source.named_parameters(recurse=False):
        if name in names:
            target.register_parameter(name, parameter)
    for name, buffer in source.named_buffers(recurse=False):
        if name in names:
            target.register_buffer(name, buffer)


def _lies_in(parameter: str, modules: Collection[str]) -> bool:
    return any(parameter == name or parameter.startswith(f"{name}.") for name in modules)


def _pixels(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
