"""Gradient sign dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.jacobian import JacobianMethod
from mtl_dist.balance.method import Key, State, generator
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS_IN_CACHE = 16384


class GradDrop(JacobianMethod):
    """In each coordinate, only the gradients of one sign, drawn by its majority (https://arxiv.org/abs/2010.06808).

        P = (1 + sum_k g_k / sum_k |g_k|) / 2;    with probability P keep the positive g_k, else the negative

    Where we differ: at the shared parameters, as in TorchJD (the paper: at a layer's activations); there the
    draw, from (seed, step), is the same on all ranks.

    `balance: {method: graddrop, leak: 0.0}`; `leak` is the part of each gradient that is never dropped.
    """

    method: Literal["graddrop"] = "graddrop"
    leak: float = Field(default=0.0, ge=0, le=1)

    def aggregate(
        self, jacobian_TP: Tensor, losses_T: Tensor, present_T: Tensor, key: Key, state: State
    ) -> Tensor:
        """See the class."""
        device = jacobian_TP.device
        draws_P = torch.rand(jacobian_TP.shape[1], generator=generator(key, device), device=device)
        update_P = jacobian_TP.new_empty(len(draws_P))
        # A CPU takes three times as long with intermediate results that don't fit its cache.
        size = COLUMNS_IN_CACHE if device.type == "cpu" else len(draws_P)
        pieces = zip(jacobian_TP.split(size, dim=1), draws_P.split(size), update_P.split(size), strict=True)
        for piece_TC, draws_C, update_C in pieces:
            update_C.copy_(self._dropped(piece_TC, draws_C))
        return update_P

    def _dropped(self, gradients_TP: Tensor, draws_P: Tensor) -> Tensor:
        total_P = gradients_TP.sum(dim=0)
        size_P = gradients_TP.abs().sum(dim=0)
        purity_P = torch.where(size_P > 0, (1 + total_P / size_P) / 2, 0.5)
        kept_TP = torch.where(draws_P < purity_P, gradients_TP.clamp_min(0), gradients_TP.clamp_max(0))
        return self.leak * total_P + (1 - self.leak) * kept_TP.sum(dim=0)
