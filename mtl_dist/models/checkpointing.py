"""Gradient checkpointing: pieces of a backbone that are computed again in the backward pass.

Non-reentrant (`use_reentrant=False`), the only kind that is right with several losses, with
`torch.autograd.grad`, under DDP and under ZeRO. The random state is kept, so dropout draws the same again,
and BatchNorm's running statistics move only the first time: in float32 losses, gradients and buffers equal
those without checkpointing bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, noop_context_fn

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

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _fixed_statistics(parts)

    # A compiler sees buffers as values and updates them once by itself; it takes no such contexts.
    context_fn = noop_context_fn if torch.compiler.is_compiling() else contexts
    outputs: tuple[Any, ...] = checkpoint(run, *inputs, use_reentrant=False, context_fn=context_fn)
    return outputs


@contextmanager
def _fixed_statistics(parts: Sequence[nn.Module]) -> Iterator[None]:
    """BatchNorm layers normalise as before but leave their running statistics and counts alone."""
    norms = [norm for part in parts for norm in part.modules() if isinstance(norm, _BatchNorm)]
    tracking = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


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
