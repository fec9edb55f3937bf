"""Impartial multi-task learning, the loss balance (IMTL-L)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, MethodSettings
from mtl_dist.balance.learned import LearnedBalancer


class IMTLLSettings(MethodSettings):
    """`balance: {method: imtl-l}`"""

    method: Literal["imtl-l"] = "imtl-l"


class IMTLL(LearnedBalancer):
    """Scales are learned which bring every loss to 1 (ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr).

        sum_k (exp(s_k) L_k - s_k)

    with s_k a trained parameter that starts at 0. For a fixed loss the optimum is exp(s_k) = 1 / L_k.
    Where we differ: not.
    """

    def __init__(self, settings: IMTLLSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)

    def factors(self, scales_T: Tensor) -> Tensor:
        """exp(s)"""
        return torch.exp(scales_T)

    def penalties(self, scales_T: Tensor) -> Tensor:
        """-s"""
        return -scales_T
