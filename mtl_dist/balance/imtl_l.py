"""Impartial multi-task learning, the loss balance (IMTL-L)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.learned import LearnedMethod
from mtl_dist.balance.method import State
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class IMTLL(LearnedMethod):
    """Scales are learned which bring every loss to 1 (ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr).

        sum_k (exp(s_k) L_k - s_k)

    with s_k a trained parameter that starts at 0. For a fixed loss the optimum is exp(s_k) = 1 / L_k.
    Where we differ: not.

    `balance: {method: imtl-l}`
    """

    method: Literal["imtl-l"] = "imtl-l"

    def factors(self, scales_T: Tensor, state: State) -> Tensor:
        """exp(s)"""
        return torch.exp(scales_T)

    def penalties(self, scales_T: Tensor) -> Tensor:
        """-s"""
        return -scales_T
