"""Smooth Tchebycheff scalarisation."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, Balancer, Key, MethodSettings, masked_softmax


class STCHSettings(MethodSettings):
    """`balance: {method: stch, mu: 1.0}`; a smaller `mu` looks more at the worst task alone."""

    method: Literal["stch"] = "stch"
    mu: float = Field(default=1.0, gt=0)


class STCH(Balancer):
    """A smooth maximum of the weighted losses: mu log sum exp(p_k L_k / mu) (https://arxiv.org/abs/2402.19078).

    p is the preference: the tasks' weights in the recipe, which bring losses of different scale together.
    As weights: w_k = p_k softmax(p L / mu)_k, the gradient of the formula.

    Where we differ: the ideal point is 0, the least that our losses can be; there is no warm-up on the
    logarithms. The smooth maximum is of global losses, over the present tasks.
    """

    needs = "losses"
    uses_task_weights = True

    def __init__(self, settings: STCHSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        self.mu = settings.mu
        self.register_buffer("preference_T", torch.tensor(tasks.weights), persistent=False)

    preference_T: Tensor

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        assert losses_T is not None
        return self.preference_T * masked_softmax(self.preference_T * losses_T / self.mu, present_T)
