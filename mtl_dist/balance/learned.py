"""Balancers whose weights are trained with the model: one scalar parameter per task."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from mtl_dist.balance.balancer import BalancedTasks, Balancer, Key


class LearnedBalancer(Balancer):
    """The scalar is sum_k (factor(s)_k L_k + penalty(s)_k), and the optimizer learns s along with the model.

    `scales` go into a parameter group of their own without weight decay. One parameter per task, not one
    vector: an optimizer would move the entries of absent tasks by their momentum.
    """

    needs = "nothing"

    def __init__(self, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        # Of shape (1,): DeepSpeed cannot broadcast a parameter without dimensions.
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in tasks.names})

    @abstractmethod
    def factors(self, scales_T: Tensor) -> Tensor:
        """What multiplies each loss."""

    @abstractmethod
    def penalties(self, scales_T: Tensor) -> Tensor:
        """What keeps the factors from going to zero."""

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The task's scale."""
        return [self.scales[task]]

    def _scales_T(self) -> Tensor:
        return torch.cat([self.scales[name] for name in self.tasks.names]).float()

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        return self.factors(self._scales_T())

    def forward(self, losses_T: Tensor, weights_T: Tensor, present_T: Tensor, share: float) -> Tensor:
        """See `combine`; the weights are computed again here, where they are differentiable."""
        scales_T = self._scales_T()
        terms_T = self.factors(scales_T) * torch.where(present_T, losses_T, 0.0)
        return torch.where(present_T, terms_T + share * self.penalties(scales_T), 0.0).sum()
