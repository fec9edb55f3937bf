"""Dual balancing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.jacobian import JacobianMethod
from mtl_dist.balance.method import SMALLEST_LOSS, BalancedTasks, Key, State
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class DBMTL(JacobianMethod):
    """Log losses, and averaged gradients brought to the length of the longest (https://arxiv.org/abs/2308.12029).

        m_k <- b m_k + (1 - b) g_k / L_k,    b = beta / t^beta_decay
        update = sum_k (max_j |m_j| / |m_k|) m_k

    Where we differ: a task's average and its t stay as they are while it is absent, and it then has no part
    in the update.

    State: `averages_TP` (as large as T gradients; empty before the first window) and `num_updates_T`.

    `balance: {method: db-mtl, beta: 0.9, beta_decay: 0.0}`; the average forgets at beta / t^beta_decay.
    """

    method: Literal["db-mtl"] = "db-mtl"
    beta: float = Field(default=0.9, ge=0, lt=1)
    beta_decay: float = Field(default=0.0, ge=0)

    def memory(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """See the class."""
        return {
            "averages_TP": torch.zeros(len(tasks), 0),
            "num_updates_T": torch.zeros(len(tasks), dtype=torch.int64),
        }

    def aggregate(
        self, jacobian_TP: Tensor, losses_T: Tensor, present_T: Tensor, key: Key, state: State
    ) -> Tensor:
        """See the class."""
        averages_TP = state["averages_TP"]
        if averages_TP.numel() == 0:
            averages_TP.resize_(jacobian_TP.shape).zero_()
        num_updates_T = state["num_updates_T"].add_(present_T)
        keep_T = self.beta / num_updates_T.clamp_min(1).float().pow(self.beta_decay)
        logged_TP = jacobian_TP / losses_T.clamp_min(SMALLEST_LOSS)[:, None]
        averaged_TP = logged_TP.lerp(averages_TP, keep_T[:, None])
        averages_TP.copy_(torch.where(present_T[:, None], averaged_TP, averages_TP))
        lengths_T = torch.where(present_T, averages_TP.norm(dim=1), 0.0)
        factors_T = torch.where(lengths_T > 0, lengths_T.max() / lengths_T, 0.0)
        return factors_T @ averages_TP
