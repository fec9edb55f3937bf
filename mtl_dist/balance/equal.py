"""Equal weights: the control of every comparison."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, Balancer, Key, MethodSettings


class EqualSettings(MethodSettings):
    """`balance: {method: equal}`"""

    method: Literal["equal"] = "equal"


class Equal(Balancer):
    """The plain sum of the losses: w_k = 1.

    Often as good as anything else once it is tuned (Kurin et al., https://arxiv.org/abs/2201.04122).
    """

    needs = "nothing"

    def __init__(self, settings: EqualSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        return torch.ones_like(self.last_weights_T)
