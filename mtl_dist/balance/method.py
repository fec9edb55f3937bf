"""The contract of a balancing method: its settings, and how it finds the weights of the tasks' losses.

A method is a frozen settings class whose fields are what a recipe says under `balance:`. It holds no tensors:
what it remembers from window to window is handed to it as `state`, which `Balancer` keeps.

A *global* loss is the mean over the labelled samples of the whole window on all ranks. An absent task has
no label in the whole window: its weight is 0, it is in no Gramian, and no state of it changes.

Shapes: T tasks in the fixed order `tasks.names`, P shared parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.randomness import shared_seed

if TYPE_CHECKING:
    from torch import Tensor

Needs = Literal["nothing", "losses", "gramian", "jacobian"]
Level = Literal["features", "parameters"]
Key: TypeAlias = tuple[int, int]
"""(seed, step): the source of every random choice, the same on all ranks."""
State: TypeAlias = Mapping[str, "Tensor"]
"""What a method remembers, by name; its tensors are changed in place."""

SMALLEST_LOSS = 1e-8
"""Keeps a loss of 0 out of logarithms and denominators."""


@dataclass(frozen=True)
class BalancedTasks:
    """The tasks in their fixed order, with what a method may know of them.

    noise_factors  the f of each task's likelihood, f exp(-s) L + s / 2: 1/2 for Gaussian noise, 1 for classes
    weights        those of the recipe
    """

    names: tuple[str, ...]
    noise_factors: tuple[float, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Window:
    """What a method sees of the micro-batches of one optimizer step.

    present_T   bool, the tasks that have a label
    key         the source of random choices
    losses_T    the global losses, for a method that needs "losses" or "gramian"
    gramian_TT  the global Gramian of the tasks' gradients, where it needs one and solves in this step
    """

    present_T: Tensor
    key: Key
    losses_T: Tensor | None = None
    gramian_TT: Tensor | None = None


class Method(Settings, ABC):
    """One method of balancing; each is a class of its own, which `method` names."""

    needs: ClassVar[Needs]
    uses_task_weights: ClassVar[bool] = False
    """Whether `tasks.<name>.weight` means something to the method; otherwise it must be 1."""
    observes: ClassVar[bool] = False
    """Whether `observe` learns anything: it costs a sum over the ranks in every window."""
    learns: ClassVar[bool] = False
    """Whether the optimizer trains a scale for each task: `state["scales_T"]`, which begin at 0."""

    method: str
    diagnose_every: int = Field(default=100, ge=0)
    """Compare the tasks' gradients every so many steps, and write down their lengths, the cosines between
    them and the weights; 0: never. Methods on gradients know them anyway; the others read them at the
    features in that step."""

    @property
    def where(self) -> Level | None:
        """Where the gradients are taken, for the methods which need them."""
        return None

    @property
    def period(self) -> int:
        """Solve every so many steps; keep the weights in between."""
        return 1

    @property
    def scales_heads(self) -> bool:
        """Whether the weights also multiply the gradients of the heads, or only those of the shared part."""
        return True

    def first_weight(self, num_tasks: int) -> float:
        """Each task's weight where the first window has no solution."""
        return 1.0

    def constants(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """What `state` holds of the tasks themselves: of the recipe, so in no checkpoint."""
        return {}

    def memory(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """What `state` remembers from window to window, as it begins; what is empty takes its size later."""
        return {}

    @abstractmethod
    def propose(self, window: Window, state: State) -> Tensor:
        """The weights (T,); NaN among the present tasks says "no solution".

        The only place where `state` changes while the method solves. Rows of absent tasks may hold anything.
        """

    def weights(self, losses_T: npt.ArrayLike, /, *, step: int = 0) -> npt.NDArray[np.float64]:
        """The weights (T,) for the losses of one window: an array, a tensor, a list.

        `step` picks the draw of a method with randomness. What a method remembers or learns from window to
        window is as at its beginning.

        Raises:
            UserError: not a row of finite numbers, or one for which the method has no solution.
        """
        losses = in_float64(losses_T)
        if losses.ndim != 1 or not len(losses) or not losses.isfinite().all():
            raise UserError(
                f"losses: expected a row (T,) of finite numbers, found shape {tuple(losses.shape)}. "
                "Give one per task."
            )
        present = torch.ones(len(losses), dtype=torch.bool)
        solution = self.propose(Window(present, (0, step), losses.float()), self.first_state(len(losses)))
        if not solution.isfinite().all():
            raise UserError(f"losses: expected some with a solution, found {losses.tolist()}.")
        return np.asarray(solution.double())

    def first_state(self, num_tasks: int) -> State:
        """What `state` holds in the first window of tasks of which nothing is known."""
        names = tuple(str(number) for number in range(num_tasks))
        tasks = BalancedTasks(names, (1.0,) * num_tasks, (1.0,) * num_tasks)
        state = {**self.constants(tasks), **self.memory(tasks)}
        state["last_weights_T"] = torch.full((num_tasks,), self.first_weight(num_tasks))
        if self.learns:
            state["scales_T"] = torch.zeros(num_tasks)
        return state

    def combine(
        self, losses_T: Tensor, weights_T: Tensor, present_T: Tensor, scale: float, state: State
    ) -> Tensor:
        """The scalar for one backward, from one micro-batch's part of the losses; see `Balancer.combine`."""
        # Masked before the product: 0 * NaN is NaN, also in the backward.
        return (weights_T * torch.where(present_T, losses_T, 0.0)).sum()

    def observe(self, losses_T: Tensor, present_T: Tensor, state: State) -> None:
        """Learn from a finished window's global losses."""

    def end_epoch(self, state: State) -> None:
        """Learn that an epoch of the data has ended."""


def generator(key: Key, device: torch.device | str) -> torch.Generator:
    """A generator for one step: the same on every rank (a CPU's and a GPU's draw different numbers)."""
    return torch.Generator(device).manual_seed(shared_seed(*key))


def masked_softmax(logits_T: Tensor, present_T: Tensor) -> Tensor:
    """The softmax over the present tasks; 0 elsewhere, also where no task is present."""
    return torch.where(present_T, logits_T.masked_fill(~present_T, -torch.inf).softmax(dim=0), 0.0)


def in_float64(values: npt.ArrayLike) -> Tensor:
    """An array, a tensor of any device, or nested lists, in float64 on the CPU."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double()
    return torch.from_numpy(np.array(values, dtype=np.float64))
