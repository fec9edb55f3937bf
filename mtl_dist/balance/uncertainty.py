"""Uncertainty weighting."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, MethodSettings
from mtl_dist.balance.learned import LearnedBalancer


class UncertaintySettings(MethodSettings):
    """`balance: {method: uncertainty}`"""

    method: Literal["uncertainty"] = "uncertainty"


class Uncertainty(LearnedBalancer):
    """Each task's noise is learned, and a noisy task counts less (https://arxiv.org/abs/1705.07115).

        sum_k (f_k exp(-s_k) L_k + s_k / 2),    f = 1/2 for regression, 1 for classification

    with s_k = log sigma_k^2, a trained parameter that starts at 0. Segmentation and multilabel tasks are
    classifications.

    Where we differ: not from the paper; LibMTL and TorchJD use f = 1/2 for every task.
    """

    halves_T: Tensor

    def __init__(self, settings: UncertaintySettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        halves = [0.5 if kind == "regression" else 1.0 for kind in tasks.kinds]
        self.register_buffer("halves_T", torch.tensor(halves), persistent=False)

    def factors(self, scales_T: Tensor) -> Tensor:
        """f exp(-s)"""
        return self.halves_T * torch.exp(-scales_T)

    def penalties(self, scales_T: Tensor) -> Tensor:
        """s / 2"""
        return scales_T / 2
