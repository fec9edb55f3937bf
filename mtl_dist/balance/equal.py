"""Equal weights: the control of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.method import Method, State, Window
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Equal(Method):
    """The plain sum of the losses: w_k = 1.

    Often as good as anything else once it is tuned (Kurin et al., https://arxiv.org/abs/2201.04122).

    `balance: {method: equal}`
    """

    method: Literal["equal"] = "equal"

    needs = "nothing"

    def propose(self, window: Window, state: State) -> Tensor:
        """See the class."""
        return torch.ones_like(state["last_weights_T"])
