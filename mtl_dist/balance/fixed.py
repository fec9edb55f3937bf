"""Fixed weights: the ones that the recipe's tasks name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.method import BalancedTasks, Method, State, Window
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Fixed(Method):
    """The weighted sum of the losses: w_k = `tasks.<name>.weight`.

    `balance: {method: fixed}`, the default: the weights are `tasks.<name>.weight`.
    """

    method: Literal["fixed"] = "fixed"

    needs = "nothing"
    uses_task_weights = True

    def constants(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """The weights: a resumed run with new ones in its recipe must use the new ones."""
        return {"task_weights_T": torch.tensor(tasks.weights)}

    def propose(self, window: Window, state: State) -> Tensor:
        """See the class."""
        return state["task_weights_T"]
