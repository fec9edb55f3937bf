"""Random loss weighting."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, Balancer, Key, MethodSettings, generator, masked_softmax


class RLWSettings(MethodSettings):
    """`balance: {method: rlw}`"""

    method: Literal["rlw"] = "rlw"


class RLW(Balancer):
    """New random weights at every step: w = softmax(n), n ~ N(0, 1) (https://arxiv.org/abs/2111.10603).

    Where we differ: the draw comes from (seed, step), the same on all ranks; the softmax is over the tasks
    which are present.
    """

    needs = "nothing"

    def __init__(self, settings: RLWSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        # Drawn for every task, so that a missing label changes nothing in the draws of the others.
        logits_T = torch.randn(len(self.tasks), generator=generator(key, "cpu")).to(present_T.device)
        return masked_softmax(logits_T, present_T)
