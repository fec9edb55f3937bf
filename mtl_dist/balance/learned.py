"""Methods whose weights are trained with the model: one scalar parameter per task."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from mtl_dist.balance.method import Method, State, Window
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class LearnedMethod(Method):
    """The scalar is sum_k (factor(s)_k L_k + penalty(s)_k), and the optimizer learns s along with the model.

    The scales s go into a parameter group of their own without weight decay.
    """

    needs = "nothing"
    learns = True

    @abstractmethod
    def factors(self, scales_T: Tensor, state: State) -> Tensor:
        """What multiplies each loss."""

    @abstractmethod
    def penalties(self, scales_T: Tensor) -> Tensor:
        """What keeps the factors from going to zero."""

    def propose(self, window: Window, state: State) -> Tensor:
        """The factors."""
        return self.factors(state["scales_T"], state)

    def combine(
        self, losses_T: Tensor, weights_T: Tensor, present_T: Tensor, scale: float, state: State
    ) -> Tensor:
        """The scalar; the weights are computed again here, where they are differentiable."""
        scales_T = state["scales_T"]
        terms_T = self.factors(scales_T, state) * torch.where(present_T, losses_T, 0.0)
        return torch.where(present_T, terms_T + scale * self.penalties(scales_T), 0.0).sum()
