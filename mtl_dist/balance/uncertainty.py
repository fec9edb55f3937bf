"""Uncertainty weighting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.learned import LearnedMethod
from mtl_dist.balance.method import BalancedTasks, State
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Uncertainty(LearnedMethod):
    """Each task's noise is learned, and a noisy task counts less (https://arxiv.org/abs/1705.07115).

        sum_k (f_k exp(-s_k) L_k + s_k / 2),    f = 1/2 for regression, 1 for classification

    with s_k = log sigma_k^2, a trained parameter that starts at 0. Segmentation and multilabel tasks are
    classifications.

    Where we differ: not from the paper; LibMTL and TorchJD use f = 1/2 for every task.

    `balance: {method: uncertainty}`
    """

    method: Literal["uncertainty"] = "uncertainty"

    def constants(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """The f_k."""
        return {"halves_T": torch.tensor(tasks.noise_factors)}

    def factors(self, scales_T: Tensor, state: State) -> Tensor:
        """f exp(-s)"""
        return state["halves_T"] * torch.exp(-scales_T)

    def penalties(self, scales_T: Tensor) -> Tensor:
        """s / 2"""
        return scales_T / 2
