"""Gradient sign dropout."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, Key, MethodSettings, generator
from mtl_dist.balance.jacobian import JacobianBalancer


class GradDropSettings(MethodSettings):
    """`balance: {method: graddrop, leak: 0.0}`; `leak` is the part of each gradient that is never dropped."""

    method: Literal["graddrop"] = "graddrop"
    leak: float = Field(default=0.0, ge=0, le=1)


class GradDrop(JacobianBalancer):
    """In each coordinate, only the gradients of one sign, drawn by its majority (https://arxiv.org/abs/2010.06808).

        P = (1 + sum_k g_k / sum_k |g_k|) / 2;    with probability P keep the positive g_k, else the negative

    Where we differ: at the shared parameters, as in TorchJD (the paper: at a layer's activations); there the
    draw, from (seed, step), is the same on all ranks.
    """

    def __init__(self, settings: GradDropSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        self.leak = settings.leak

    def _aggregate(self, jacobian_TP: Tensor, losses_T: Tensor, present_T: Tensor, key: Key) -> Tensor:
        total_P = jacobian_TP.sum(dim=0)
        size_P = jacobian_TP.abs().sum(dim=0)
        purity_P = torch.where(size_P > 0, (1 + total_P / size_P) / 2, 0.5)
        device = jacobian_TP.device
        draw_P = torch.rand(purity_P.shape, generator=generator(key, device), device=device)
        kept_TP = torch.where(draw_P < purity_P, jacobian_TP.clamp_min(0), jacobian_TP.clamp_max(0))
        return self.leak * total_P + (1 - self.leak) * kept_TP.sum(dim=0)
