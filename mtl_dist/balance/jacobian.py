"""Balancers that combine the gradients themselves, by coordinate or over time: they need all of J."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, Balancer, Key


class JacobianBalancer(Balancer):
    """A method whose update is no weighted sum of the tasks' gradients with one weight per task.

    `aggregate` gives the gradient of the shared parameters itself; the root module returns the scalar
    sum(parameter * aggregate) + sum_k (loss_k of the heads on detached features), whose one backward puts it
    there. J must be averaged over ranks first, which is why these methods run on one device and under DDP
    alone. `weights` are 1: each head gets the plain gradient of its own loss.
    """

    needs = "jacobian"
    level = "parameters"
    scale_heads = False

    def __init__(self, tasks: BalancedTasks) -> None:
        super().__init__(tasks)

    @torch.no_grad()
    def aggregate(self, jacobian_TP: Tensor, *, losses_T: Tensor, present_T: Tensor, key: Key) -> Tensor:
        """The gradient (P,) of the shared parameters; once per window, identically on every rank.

        `jacobian_TP` has one row per task: the gradient of its global loss, in float32. Rows of absent tasks
        are not looked at and may hold anything. Where J or a loss is not finite the answer is not either,
        no state changes, and `num_unconverged` counts it: the step must be skipped.
        """
        if not present_T.all():  # J is large: no copy without need.
            jacobian_TP = torch.where(present_T[:, None], jacobian_TP, 0.0)
        losses_T = torch.where(present_T, losses_T, 1.0)
        if not losses_T.isfinite().all():
            # Counted by `weights`, which sees the same losses.
            return torch.full_like(jacobian_TP[0], torch.nan)
        if not torch.stack(torch.aminmax(jacobian_TP)).isfinite().all():
            self.num_unconverged += 1
            return torch.full_like(jacobian_TP[0], torch.nan)
        return self._aggregate(jacobian_TP, losses_T, present_T, key)

    @abstractmethod
    def _aggregate(self, jacobian_TP: Tensor, losses_T: Tensor, present_T: Tensor, key: Key) -> Tensor:
        """The method, on finite numbers; rows of absent tasks are 0."""

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        return torch.ones_like(self.last_weights_T)
