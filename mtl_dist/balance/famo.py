"""Fast adaptive multitask optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.method import SMALLEST_LOSS, BalancedTasks, Method, State, Window, masked_softmax
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class FAMO(Method):
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

    `balance: {method: famo, lr: 0.025, weight_decay: 0.001}`; both are of the logits, not of the model.
    """

    method: Literal["famo"] = "famo"
    lr: float = Field(default=0.025, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)

    needs = "losses"

    def memory(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """See the class."""
        return {
            "logits_T": torch.zeros(len(tasks)),
            "moment_T": torch.zeros(len(tasks)),
            "square_T": torch.zeros(len(tasks)),
            "num_updates_T": torch.zeros(len(tasks), dtype=torch.int64),
            "log_losses_T": torch.full((len(tasks),), torch.nan),
        }

    def propose(self, window: Window, state: State) -> Tensor:
        """See the class."""
        present_T, losses_T = window.present_T, window.losses_T
        assert losses_T is not None
        # Below zero the logarithm is NaN, which says "no solution".
        logs_T = torch.where(losses_T < 0, losses_T, losses_T + SMALLEST_LOSS).log()
        seen_T = present_T & logs_T.isfinite()
        self._update(logs_T, seen_T, state)
        state["log_losses_T"].copy_(torch.where(seen_T, logs_T, state["log_losses_T"]))
        # z_k / L_k, normalised, is a softmax again: no loss, however small, overflows it.
        return masked_softmax(masked_softmax(state["logits_T"], present_T).log() - logs_T, present_T)

    def _update(self, logs_T: Tensor, seen_T: Tensor, state: State) -> None:
        """One step of Adam on the logits of the tasks that have a loss now and had one before."""
        changed_T = seen_T & state["log_losses_T"].isfinite()
        fall_T = torch.where(changed_T, state["log_losses_T"] - logs_T, 0.0)
        z_T = masked_softmax(state["logits_T"], changed_T)
        gradient_T = z_T * (fall_T - (z_T * fall_T).sum()) + self.weight_decay * state["logits_T"]
        num_updates_T = state["num_updates_T"] + changed_T
        moment_T = state["moment_T"].lerp(gradient_T, 1 - BETAS[0])
        square_T = state["square_T"].lerp(gradient_T.square(), 1 - BETAS[1])
        unbiased_T = moment_T / (1 - BETAS[0] ** num_updates_T.clamp_min(1))
        scale_T = (square_T / (1 - BETAS[1] ** num_updates_T.clamp_min(1))).sqrt() + EPSILON
        updated = {
            "logits_T": state["logits_T"] - self.lr * unbiased_T / scale_T,
            "moment_T": moment_T,
            "square_T": square_T,
            "num_updates_T": num_updates_T,
        }
        for name, new_T in updated.items():
            state[name].copy_(torch.where(changed_T, new_T, state[name]))
