"""Smooth Tchebycheff scalarisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.method import BalancedTasks, Method, State, Window, masked_softmax
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class STCH(Method):
    """A smooth maximum of the weighted losses: mu log sum exp(p_k L_k / mu) (https://arxiv.org/abs/2402.19078).

    p is the preference: the tasks' weights in the recipe, which bring losses of different scale together.
    As weights: w_k = p_k softmax(p L / mu)_k, the gradient of the formula.

    Where we differ: the ideal point is 0, the least that our losses can be; there is no warm-up on the
    logarithms. The smooth maximum is of global losses, over the present tasks.

    `balance: {method: stch, mu: 1.0}`; a smaller `mu` looks more at the worst task alone.
    """

    method: Literal["stch"] = "stch"
    mu: float = Field(default=1.0, gt=0)

    needs = "losses"
    uses_task_weights = True

    def constants(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """The preference."""
        return {"preference_T": torch.tensor(tasks.weights)}

    def propose(self, window: Window, state: State) -> Tensor:
        """See the class."""
        assert window.losses_T is not None
        preference_T = state["preference_T"]
        return preference_T * masked_softmax(preference_T * window.losses_T / self.mu, window.present_T)
