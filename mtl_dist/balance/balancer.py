"""The balancer: how the losses of several tasks become one scalar.

The root module calls it once per window (the micro-batches of one optimizer step), in this order:

    1. `needs_at(step)`       what `weights` wants to see of this window: "nothing" more than its labels,
                              the global "losses", the "gramian" as well, or the "jacobian"
    2. `weights(...)`         once per window, identically on every rank; the only place where state of the
                              method changes while it solves
    3. `combine(...)`         once per micro-batch: the scalar of the one backward
    4. `observe(...)`         once per window, with its global losses
    5. `end_epoch()`          once per epoch of the data

A *global* loss is the mean over the labelled samples of the whole window on all ranks. An absent task has
no label in the whole window: its weight is 0, it is in no Gramian, and no state of it changes.

Shapes: T tasks in the fixed order `tasks.names`, P shared parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from mtl_dist.config.settings import Settings
from mtl_dist.randomness import shared_seed
from mtl_dist.specs import TaskKind

Needs = Literal["nothing", "losses", "gramian", "jacobian"]
Level = Literal["features", "parameters"]
Key: TypeAlias = tuple[int, int]
"""(seed, step): the source of every random choice, the same on all ranks."""

SMALLEST_LOSS = 1e-8
"""Keeps a loss of 0 out of logarithms and denominators."""


class MethodSettings(Settings):
    """What all methods have in common.

    diagnose_every  compare the tasks' gradients every so many steps, and write down their lengths, the
                    cosines between them and the weights; 0: never. Methods on gradients know them anyway;
                    the others read them at the features in that step.
    """

    diagnose_every: int = Field(default=100, ge=0)


@dataclass(frozen=True)
class BalancedTasks:
    """The tasks in their fixed order, with what a method may know of them: kind, and weight of the recipe."""

    names: tuple[str, ...]
    kinds: tuple[TaskKind, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.names)


class Balancer(nn.Module, ABC):
    """One method of balancing; a part of the root module, whose state_dict carries its state.

    Buffers that every method has:
        last_weights_T   float32, each task's weight in the last window in which it took part: what is used
                         again where a window has no solution
        num_unconverged  int64, the windows that had no solution (no convergence, or numbers not finite)
    """

    needs: ClassVar[Needs]
    uses_task_weights: ClassVar[bool] = False
    """Whether `tasks.<name>.weight` means something to the method; otherwise it must be 1."""
    observes: ClassVar[bool] = False
    """Whether `observe` learns anything: it costs a sum over the ranks in every window."""

    last_weights_T: Tensor
    num_unconverged: Tensor

    level: Level | None = None
    """Where the gradients are taken, for the methods which need them."""
    every: int = 1
    """Solve every so many steps; keep the weights in between."""
    scale_heads: bool = True
    """Whether the weights also multiply the gradients of the heads, or only those of the shared part."""

    def __init__(self, tasks: BalancedTasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("last_weights_T", torch.ones(len(tasks)))
        self.register_buffer("num_unconverged", torch.zeros((), dtype=torch.int64))

    def needs_at(self, step: int) -> Needs:
        """What `weights` must be given at this step; "nothing" in the steps between two solves."""
        return self.needs if step % self.every == 0 else "nothing"

    @torch.no_grad()
    def weights(
        self,
        *,
        present_T: Tensor,
        key: Key,
        losses_T: Tensor | None = None,
        gramian_TT: Tensor | None = None,
    ) -> Tensor:
        """The weights of this window: float32 (T,), detached, 0 for absent tasks.

        Identical on all ranks for identical arguments. `losses_T` are the window's global losses, for
        "losses" and "gramian"; `gramian_TT` the global Gramian of the tasks' gradients (float32), for
        "gramian". Rows of absent tasks are not looked at and may hold anything.

        Where there is no solution, the last weights are used and `num_unconverged` counts it.
        """
        proposed_T = self._propose(present_T=present_T, key=key, losses_T=losses_T, gramian_TT=gramian_TT)
        usable = (proposed_T.isfinite() | ~present_T).all()
        if losses_T is not None:
            usable &= (losses_T.isfinite() | ~present_T).all()
        self.last_weights_T.copy_(torch.where(present_T & usable, proposed_T, self.last_weights_T))
        self.num_unconverged += ~usable
        return torch.where(present_T, self.last_weights_T, 0.0)

    @abstractmethod
    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        """The method's weights (T,); NaN among the present tasks says "no solution"."""

    def combine(self, losses_T: Tensor, weights_T: Tensor, present_T: Tensor, share: float = 1.0) -> Tensor:
        """The scalar for one backward, from one micro-batch's share of the losses.

        `losses_T` are differentiable, and such that their sum over the window's micro-batches and mean over
        ranks is the global loss. `share` is this micro-batch's part of the window, 1 / accumulation: terms
        that do not depend on the data (the log-variances of uncertainty) are added in this proportion.
        Losses of absent tasks may be NaN.
        """
        # Through __call__, so that ZeRO 3 gathers a balancer's parameters before they are read.
        scalar: Tensor = self(losses_T, weights_T, present_T, share)
        return scalar

    def forward(self, losses_T: Tensor, weights_T: Tensor, present_T: Tensor, share: float) -> Tensor:
        """See `combine`."""
        # Masked before the product: 0 * NaN is NaN, also in the backward.
        return (weights_T * torch.where(present_T, losses_T, 0.0)).sum()

    def observe(self, losses_T: Tensor, present_T: Tensor) -> None:
        """Learn from a finished window's global losses, detached."""

    def end_epoch(self) -> None:
        """Learn that an epoch of the data has ended."""

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The trainable parameters that belong to one task alone; untouched while it is absent.

        Like a head's: their gradient is 0 in a window without the task, and the optimizer must pass them by.
        """
        return []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:
        # `root.bfloat16()` would round the state; buffers follow the device, never the precision.
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != dtype:
                self._buffers[name] = before[name].to(after.device)
        return self


def generator(key: Key, device: torch.device | str) -> torch.Generator:
    """A generator for one step: the same on every rank (a CPU's and a GPU's draw different numbers)."""
    return torch.Generator(device).manual_seed(shared_seed(*key))


def masked_softmax(logits_T: Tensor, present_T: Tensor) -> Tensor:
    """The softmax over the present tasks; 0 elsewhere, also where no task is present."""
    return torch.where(present_T, logits_T.masked_fill(~present_T, -torch.inf).softmax(dim=0), 0.0)


BalancerFactory: TypeAlias = Callable[[Any, BalancedTasks], Balancer]
"""A method's class: called with its own settings and the tasks."""
