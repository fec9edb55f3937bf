"""Gradient checkpointing: pieces of a backbone or a decoder that are computed again in the backward pass.

Non-reentrant (`use_reentrant=False`), the only kind that is right with several losses, with
`torch.autograd.grad`, under DDP and under ZeRO. The random state is kept, so dropout draws the same again,
and BatchNorm's running statistics move only the first time: in float32 losses, gradients and buffers equal
those without checkpointing bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mtl_dist.models.settings import Checkpointing
from mtl_dist.models.tracing import Stage, Step

NUM_PARTS_WITHOUT_PYRAMID = 4
"""A network of one stage (a ViT) is cut into as many parts as a pyramid has: as one it would save nothing."""


@dataclass(frozen=True)
class Segment:
    """Consecutive steps: the values they take from before, and those they leave for later.

    `last_used` are the inputs that no later segment needs; `dead_after` says which values of its own no
    step needs after a given one.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_used: tuple[str, ...]
    dead_after: Mapping[str, tuple[str, ...]]


def cut(
    module: nn.Module,
    steps: Sequence[Step],
    stages: Mapping[int, Stage],
    results: Sequence[str],
    mode: Checkpointing,
) -> tuple[Segment, ...]:
    """Cut `steps` into segments: one for "off", one per stage, or one per block.

    A block is a step whose module has children; the layers between two blocks are one segment. `results`
    are the values wanted in the end.
    """
    if mode == "off":
        return _segments([tuple(steps)], results)
    blocks = {step.name for step in steps if _is_block(module, step)}
    ends = {stage.step for stage in stages.values()}
    if mode == "block":
        ends |= blocks
        ends |= {before.name for before, step in itertools.pairwise(steps) if step.name in blocks}
    elif len(stages) == 1:
        ordered = [step.name for step in steps if step.name in blocks]
        size = -(-len(ordered) // NUM_PARTS_WITHOUT_PYRAMID) or 1
        ends |= set(ordered[size - 1 :: size])
    groups: list[tuple[Step, ...]] = []
    group: list[Step] = []
    for step in steps:
        group.append(step)
        if step.name in ends:
            groups.append(tuple(group))
            group = []
    return _segments([*groups, tuple(group)] if group else groups, results)


def recomputed(
    run: Callable[..., tuple[Any, ...]], inputs: Sequence[Any], parts: Sequence[nn.Module]
) -> tuple[Any, ...]:
    """`run(*inputs)`, whose intermediate values are dropped and computed again for the backward pass.

    `parts` are the modules that `run` runs.
    """

    if torch.compiler.is_compiling():
        # A compiler takes no contexts and needs none: it updates buffers once, outside what it recomputes.
        return tuple(checkpoint(run, *inputs, use_reentrant=False))
    contexts = partial(_recompute_contexts, parts)
    return tuple(checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts))


class Recomputing:
    """In place of a module's `forward`: it is computed again for the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        run = partial(type(self.module).forward, self.module, **options)
        trains = is_grad_enabled() and any(p.requires_grad for p in self.module.parameters())
        if not trains:
            return run(*inputs)
        return recomputed(lambda *args: (run(*args),), inputs, [self.module])[0]


def inner_blocks(module: nn.Module) -> list[nn.Module]:
    """The parts of a module that have parts themselves; those of a list one by one."""
    blocks = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            blocks += inner_blocks(child)
        elif any(True for _ in child.children()):
            blocks.append(child)
    return blocks


def recompute_decoder(decoder: nn.Module, mode: Checkpointing) -> None:
    """Have a decoder computed again for the backward pass: whole ("stage"), or a block at a time ("block").

    Its blocks are what a method `blocks` of it names, or its parts that have parts themselves.
    """
    if mode == "off":
        return
    own = getattr(decoder, "blocks", None)
    blocks = (own() if callable(own) else inner_blocks(decoder)) if mode == "block" else [decoder]
    for block in blocks:
        block.forward = Recomputing(block)


def _recompute_contexts(
    parts: Sequence[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first computation, and around the second."""
    return nullcontext(), _FixedStatistics(parts)


class _FixedStatistics(AbstractContextManager[None]):
    """BatchNorm layers normalise as before but leave their running statistics and counts alone.

    Updates of momentum 0 change no statistic, and a scratch number counts the batches. (Switching the
    tracking off would be simpler, but then BatchNorm saves other tensors for its backward pass than the
    first time, which checkpointing refuses.) Entered again for every backward pass over a graph.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._norms = [norm for part in parts for norm in part.modules() if isinstance(norm, _BatchNorm)]
        self._kept: list[tuple[_BatchNorm, float | None, Tensor]] = []

    def __enter__(self) -> None:
        for norm in self._norms:
            if norm.training and norm.num_batches_tracked is not None:
                self._kept.append((norm, norm.momentum, norm.num_batches_tracked))
        if self._kept:
            scratch = torch.zeros_like(self._kept[0][2])
            for norm, _, _ in self._kept:
                norm.momentum, norm.num_batches_tracked = 0.0, scratch

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self._kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
        self._kept.clear()


def _is_block(module: nn.Module, step: Step) -> bool:
    return step.kind == "module" and any(True for _ in module.get_submodule(str(step.target)).children())


def _segments(groups: Sequence[tuple[Step, ...]], results: Sequence[str]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    later = set(results)
    for steps in reversed(groups):
        inside = {step.name for step in steps}
        used = {name for step in steps for name in step.inputs} - inside
        outputs = tuple(step.name for step in steps if step.name in later)
        inputs, last_used = tuple(sorted(used)), tuple(sorted(used - later))
        segments.append(Segment(steps, inputs, outputs, last_used, _dead_after(steps, keep=outputs)))
        later |= used
    return tuple(reversed(segments))


def _dead_after(steps: Sequence[Step], keep: Sequence[str]) -> dict[str, tuple[str, ...]]:
    dead: dict[str, tuple[str, ...]] = {}
    seen = set(keep)
    for step in reversed(steps):
        dead[step.name] = tuple(name for name in dict.fromkeys(step.inputs) if name not in seen)
        seen.update(step.inputs)
    return dead
