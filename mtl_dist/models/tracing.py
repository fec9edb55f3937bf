"""A backbone as a list of steps: `torch.fx` traces it once, with whole blocks as single steps.

Running the steps gives what the module's `forward` gives. Cutting the list gives what its `forward` can't:
the map at each resolution, a backbone without its classifier, and pieces to checkpoint. Blocks (a ResNet
block, a transformer layer) run their own code, so dropout and the like follow `train()` and `eval()`.

Shape legend: batch.py; N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torchvision.models.maxvit import MaxVitBlock
from torchvision.models.vision_transformer import Encoder

from mtl_dist.errors import UserError

Layout: TypeAlias = Literal["nchw", "nhwc", "tokens"]
Values: TypeAlias = dict[str, Any]

MAX_STRIDE = 32
_MAX_SKEW = 0.5
"""A map is a scaled image: the logarithms of its height's and its width's reduction differ by less."""


@dataclass(frozen=True)
class Ref:
    """The value of an earlier step, by its name."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation: `target` is a submodule's or attribute's path, a function, or a method's name."""

    name: str
    kind: Literal["module", "function", "method", "attribute"]
    target: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[str, ...]

    @property
    def part(self) -> str:
        """The top-level child or parameter that the step uses; "" where it uses none."""
        return str(self.target).partition(".")[0] if self.kind in ("module", "attribute") else ""


@dataclass(frozen=True)
class Stage:
    """The last map at one stride: which step gives it, its channels, its size in the probe, its layout."""

    step: str
    stride: int
    channels: int
    grid: tuple[int, int]
    layout: Layout

    def to_map(self, value: Tensor) -> Tensor:
        """The step's value as (B, D, H, W), a tensor of its own in the graph. A class token is dropped.

        The network goes on from the step's value, not from this: a gradient with respect to the map is
        then that of the heads which read it, without what comes back from the deeper layers.
        """
        if self.layout == "nhwc":
            return value.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            height, width = self.grid
            patches_BND = value[:, value.shape[1] - height * width :]
            return patches_BND.transpose(1, 2).unflatten(2, self.grid)
        return value.view_as(value)


@dataclass(frozen=True)
class Trace:
    """A traced module: its steps in order, the name of its input, and its stages by stride.

    `vector_step` is the step whose value (B, D) is the module's own vector; None where the vector is the
    mean over the deepest map.
    """

    input: str
    steps: tuple[Step, ...]
    stages: Mapping[int, Stage]
    vector_step: str | None
    vector_size: int

    @property
    def deepest(self) -> Stage:
        """The stage of the largest stride."""
        return self.stages[max(self.stages)]


class _BlockTracer(fx.Tracer):
    """Looks into containers only: every other module is one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (nn.Sequential, nn.ModuleList, Encoder, MaxVitBlock))


def trace(module: nn.Module, in_channels: int, probe_size: tuple[int, int], *, has_classifier: bool) -> Trace:
    """Trace `module` and find its stages from the shapes of one forward of a `probe_size` image.

    The probe runs on the meta device: shapes only. A probe that isn't square distinguishes (B, C, H, W) from
    (B, H, W, C). With `has_classifier` the last part that has parameters is cut off; without, the module's
    output is its vector.
    """
    graph = _BlockTracer().trace(module)
    source = next(node.name for node in graph.nodes if node.op == "placeholder")
    steps = tuple(_step(node) for node in graph.nodes if node.op not in ("placeholder", "output"))
    if has_classifier:
        steps = _without_classifier(module, steps)
    shapes = step_shapes(module, source, steps, (in_channels, *probe_size))
    stages = _find_stages(steps, shapes, probe_size)
    if not stages:
        raise UserError(
            "model.backbone: expected a network over maps or patches, found no map at any stride up to "
            f"{MAX_STRIDE}. Choose a convolutional network or a vision transformer."
        )
    # A network without a classifier gives its vector itself, or a map.
    vector_step = None if has_classifier or len(shapes[steps[-1].name]) != 2 else steps[-1].name
    vector_size = stages[max(stages)].channels if vector_step is None else shapes[vector_step][-1]
    return Trace(source, steps, stages, vector_step, vector_size)


def step_shapes(
    module: nn.Module, source: str, steps: Sequence[Step], image_CHW: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The shape of every step's tensor for one image, computed on the meta device.

    Raises:
        RuntimeError, ValueError: the layers don't take an image of this size.
    """
    image = torch.empty(1, *image_CHW, device="meta")
    shapes: dict[str, tuple[int, ...]] = on_meta(_Recorder(module, source, steps), image)
    return shapes


def on_meta(module: nn.Module, image: Tensor) -> Any:
    """`module(image)` in evaluation mode with its tensors on the meta device: shapes at no cost.

    The module itself, wherever it lies, stays as it is.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(module, meta, (image,))
    finally:
        for part, mode in modes.items():
            part.training = mode


def needed_steps(steps: Sequence[Step], outputs: Collection[str]) -> tuple[Step, ...]:
    """The steps that the values `outputs` depend on, in order."""
    needed = set(outputs)
    for step in reversed(steps):
        if step.name in needed:
            needed.update(step.inputs)
    return tuple(step for step in steps if step.name in needed)


def run_step(module: nn.Module, step: Step, values: Values) -> Any:
    """The value of one step, given the values of the earlier ones."""
    args = _resolve(step.args, values)
    kwargs = {key: _resolve(value, values) for key, value in step.kwargs.items()}
    if callable(step.target):
        return step.target(*args, **kwargs)
    if step.kind == "method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    owner: Any = module
    for part in step.target.split("."):
        owner = getattr(owner, part)
    return owner(*args, **kwargs) if step.kind == "module" else owner


class _Recorder(nn.Module):
    """Runs the steps and returns their tensors' shapes; a module, so that its weights can be swapped."""

    def __init__(self, module: nn.Module, source: str, steps: Sequence[Step]) -> None:
        super().__init__()
        self.module, self.source, self.steps = module, source, steps

    def forward(self, image: Tensor) -> dict[str, tuple[int, ...]]:
        values: Values = {self.source: image}
        for step in self.steps:
            values[step.name] = run_step(self.module, step, values)
        return {
            step.name: tuple(values[step.name].shape)
            for step in self.steps
            if isinstance(values[step.name], Tensor)
        }


_KINDS: dict[str, Literal["module", "function", "method", "attribute"]] = {
    "call_module": "module",
    "call_function": "function",
    "call_method": "method",
    "get_attr": "attribute",
}


def _step(node: fx.Node) -> Step:
    return Step(
        name=node.name,
        kind=_KINDS[node.op],
        target=node.target,
        args=tuple(_with_refs(arg) for arg in node.args),
        kwargs={key: _with_refs(value) for key, value in node.kwargs.items()},
        inputs=tuple(source.name for source in node.all_input_nodes),
    )


def _with_refs(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return Ref(arg.name)
    return _mapped(_with_refs, arg)


def _resolve(arg: Any, values: Values) -> Any:
    if isinstance(arg, Ref):
        return values[arg.name]
    return _mapped(lambda item: _resolve(item, values), arg)


def _mapped(function: Callable[[Any], Any], arg: Any) -> Any:
    """A nested argument with `function` applied to its items; anything else as it is."""
    if isinstance(arg, tuple):
        return tuple(function(item) for item in arg)
    if isinstance(arg, list):
        return [function(item) for item in arg]
    if isinstance(arg, dict):
        return {key: function(value) for key, value in arg.items()}
    if isinstance(arg, slice):
        return slice(function(arg.start), function(arg.stop), function(arg.step))
    return arg


def _without_classifier(module: nn.Module, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps before the top-level child that owns the last parameters."""

    def has_parameters(step: Step) -> bool:
        return step.kind == "module" and any(
            True for _ in module.get_submodule(str(step.target)).parameters()
        )

    classifier = next(step.part for step in reversed(steps) if has_parameters(step))
    first = next(index for index, step in enumerate(steps) if step.part == classifier)
    return steps[:first]


def _find_stages(
    steps: Sequence[Step], shapes: Mapping[str, tuple[int, ...]], image_size: tuple[int, int]
) -> dict[int, Stage]:
    stages: dict[int, Stage] = {}
    for step in steps:
        shape = shapes.get(step.name, ())
        stage = None
        if len(shape) == 4:
            stage = _map_stage(step.name, shape, image_size)
        elif len(shape) == 3 and stages:
            stage = _token_stage(step.name, shape, stages[max(stages)])
        if stage is not None:
            stages[stage.stride] = stage
    return dict(sorted(stages.items()))


def _map_stage(name: str, shape: tuple[int, ...], image_size: tuple[int, int]) -> Stage | None:
    def octaves(grid: tuple[int, ...]) -> tuple[float, float]:
        return math.log2(image_size[0] / grid[0]), math.log2(image_size[1] / grid[1])

    def skew(layout: Layout) -> float:
        high, wide = octaves(grids[layout])
        return abs(high - wide)

    grids: dict[Layout, tuple[int, ...]] = {"nchw": shape[2:], "nhwc": shape[1:3]}
    layout = min(grids, key=skew)
    stride = 2 ** round(sum(octaves(grids[layout])) / 2)
    if skew(layout) > _MAX_SKEW or not 1 <= stride <= MAX_STRIDE:
        return None
    height, width = grids[layout]
    return Stage(name, int(stride), shape[1 if layout == "nchw" else 3], (height, width), layout)


def _token_stage(name: str, shape: tuple[int, ...], patches: Stage) -> Stage | None:
    """The patch tokens (with or without one class token) that a map was turned into."""
    num_patches = patches.grid[0] * patches.grid[1]
    if shape[1] - num_patches not in (0, 1):
        return None
    return Stage(name, patches.stride, shape[2], patches.grid, "tokens")
