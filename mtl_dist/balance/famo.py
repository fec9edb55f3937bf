"""Fast adaptive multitask optimisation."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mtl_dist.balance.balancer import (
    SMALLEST_LOSS,
    BalancedTasks,
    Balancer,
    Key,
    MethodSettings,
    masked_softmax,
)

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class FAMOSettings(MethodSettings):
    """`balance: {method: famo, lr: 0.025, weight_decay: 0.001}`; both are of the logits, not of the model."""

    method: Literal["famo"] = "famo"
    lr: float = Field(default=0.025, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)


class FAMO(Balancer):
    """All losses fall at the same relative rate, without any task's gradient (https://arxiv.org/abs/2306.03792).

        z = softmax(xi),    scalar = c sum_k z_k log L_k,    c = 1 / sum_k (z_k / L_k)

    As weights: w_k = c z_k / L_k, which sum to 1. The logits xi descend, by Adam, on
    d = softmax'(xi) . (log L_before - log L_after), the change that the last step made.

    Where we differ: L_after is the loss of the *next* window, seen when that window is there anyway, instead
    of a second forward of the same one (which would also update BatchNorm twice). A task's L_before is from
    the last window in which it was present; logits and Adam's moments of an absent task stay as they are,
    and the softmax is over the present tasks. The lower bounds of the losses are 0.
    The official code clips the shared gradient to norm 1: use `optim`'s clipping, after the backward.

    State: `logits_T`, Adam's `moment_T`, `square_T` and `num_updates_T`, and `log_losses_T` (NaN: not seen).
    """

    needs = "losses"

    logits_T: Tensor
    moment_T: Tensor
    square_T: Tensor
    num_updates_T: Tensor
    log_losses_T: Tensor

    def __init__(self, settings: FAMOSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        self.lr = settings.lr
        self.weight_decay = settings.weight_decay
        num_tasks = len(tasks)
        self.register_buffer("logits_T", torch.zeros(num_tasks))
        self.register_buffer("moment_T", torch.zeros(num_tasks))
        self.register_buffer("square_T", torch.zeros(num_tasks))
        self.register_buffer("num_updates_T", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("log_losses_T", torch.full((num_tasks,), torch.nan))

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        assert losses_T is not None
        # Below zero the logarithm is NaN, which says "no solution".
        logs_T = torch.where(losses_T < 0, losses_T, losses_T + SMALLEST_LOSS).log()
        seen_T = present_T & logs_T.isfinite()
        self._update(logs_T, seen_T)
        self.log_losses_T.copy_(torch.where(seen_T, logs_T, self.log_losses_T))
        # z_k / L_k, normalised, is a softmax again: no loss, however small, overflows it.
        return masked_softmax(masked_softmax(self.logits_T, present_T).log() - logs_T, present_T)

    def _update(self, logs_T: Tensor, seen_T: Tensor) -> None:
        """One step of Adam on the logits of the tasks that have a loss now and had one before."""
        changed_T = seen_T & self.log_losses_T.isfinite()
        fall_T = torch.where(changed_T, self.log_losses_T - logs_T, 0.0)
        z_T = masked_softmax(self.logits_T, changed_T)
        gradient_T = z_T * (fall_T - (z_T * fall_T).sum()) + self.weight_decay * self.logits_T
        num_updates_T = self.num_updates_T + changed_T
        moment_T = self.moment_T.lerp(gradient_T, 1 - BETAS[0])
        square_T = self.square_T.lerp(gradient_T.square(), 1 - BETAS[1])
        unbiased_T = moment_T / (1 - BETAS[0] ** num_updates_T.clamp_min(1))
        scale_T = (square_T / (1 - BETAS[1] ** num_updates_T.clamp_min(1))).sqrt() + EPSILON
        logits_T = self.logits_T - self.lr * unbiased_T / scale_T
        for state_T, new_T in [
            (self.logits_T, logits_T),
            (self.moment_T, moment_T),
            (self.square_T, square_T),
            (self.num_updates_T, num_updates_T),
        ]:
            state_T.copy_(torch.where(changed_T, new_T, state_T))
