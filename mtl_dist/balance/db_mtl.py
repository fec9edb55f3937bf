"""Dual balancing."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mtl_dist.balance.balancer import SMALLEST_LOSS, BalancedTasks, Key, MethodSettings
from mtl_dist.balance.jacobian import JacobianBalancer


class DBMTLSettings(MethodSettings):
    """`balance: {method: db-mtl, beta: 0.9, beta_decay: 0.0}`; the average forgets at beta / t^beta_decay."""

    method: Literal["db-mtl"] = "db-mtl"
    beta: float = Field(default=0.9, ge=0, lt=1)
    beta_decay: float = Field(default=0.0, ge=0)


class DBMTL(JacobianBalancer):
    """Log losses, and averaged gradients brought to the length of the longest (https://arxiv.org/abs/2308.12029).

        m_k <- b m_k + (1 - b) g_k / L_k,    b = beta / t^beta_decay
        update = sum_k (max_j |m_j| / |m_k|) m_k

    Where we differ: a task's average and its t stay as they are while it is absent, and it then has no part
    in the update.

    State: `averages_TP` (as large as T gradients; empty before the first window) and `num_updates_T`.
    """

    averages_TP: Tensor
    num_updates_T: Tensor

    def __init__(self, settings: DBMTLSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        self.beta = settings.beta
        self.beta_decay = settings.beta_decay
        self.register_buffer("averages_TP", torch.zeros(len(tasks), 0))
        self.register_buffer("num_updates_T", torch.zeros(len(tasks), dtype=torch.int64))

    def _aggregate(self, jacobian_TP: Tensor, losses_T: Tensor, present_T: Tensor, key: Key) -> Tensor:
        if self.averages_TP.shape[1] == 0:
            self.averages_TP = torch.zeros_like(jacobian_TP)
        self.num_updates_T += present_T
        keep_T = self.beta / self.num_updates_T.clamp_min(1).float().pow(self.beta_decay)
        logged_TP = jacobian_TP / losses_T.clamp_min(SMALLEST_LOSS)[:, None]
        averaged_TP = logged_TP.lerp(self.averages_TP, keep_T[:, None])
        self.averages_TP.copy_(torch.where(present_T[:, None], averaged_TP, self.averages_TP))
        lengths_T = torch.where(present_T, self.averages_TP.norm(dim=1), 0.0)
        factors_T = torch.where(lengths_T > 0, lengths_T.max() / lengths_T, 0.0)
        return factors_T @ self.averages_TP

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of parameters is learned from the first window, or from the checkpoint.
        saved = state_dict.get(prefix + "averages_TP")
        if saved is not None:
            self.averages_TP = self.averages_TP.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
