"""Fixed weights: the ones that the recipe's tasks name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, Balancer, Key, MethodSettings


class FixedSettings(MethodSettings):
    """`balance: {method: fixed}`, the default: the weights are `tasks.<name>.weight`."""

    method: Literal["fixed"] = "fixed"


class Fixed(Balancer):
    """The weighted sum of the losses: w_k = `tasks.<name>.weight`."""

    needs = "nothing"
    uses_task_weights = True

    def __init__(self, settings: FixedSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        # From the recipe, not from a checkpoint: a resumed run with new weights must use the new ones.
        self.register_buffer("task_weights_T", torch.tensor(tasks.weights), persistent=False)

    task_weights_T: Tensor

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        return self.task_weights_T
