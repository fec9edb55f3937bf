"""Dynamic weight average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.method import SMALLEST_LOSS, BalancedTasks, Method, State, Window, masked_softmax
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class DWA(Method):
    """More weight for the tasks whose loss falls slowly (https://arxiv.org/abs/1803.10704).

        w_k = T softmax(r / temperature)_k,    r_k = L_k(t-1) / L_k(t-2)

    with L_k(t) the mean loss of task k in epoch t; r_k = 1 until the task has two epochs.

    Where we differ: the means are of global losses over the windows in which the task was present, and a
    task which was absent for a whole epoch keeps its history; the softmax is over the present tasks, times
    their number.

    State: `epoch_means_2T` (older, newer), `num_epochs_T`, and the running epoch's mean and windows.

    `balance: {method: dwa, temperature: 2.0}`; a higher temperature is nearer to equal weights.
    """

    method: Literal["dwa"] = "dwa"
    temperature: float = Field(default=2.0, gt=0)

    needs = "nothing"
    observes = True

    def memory(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """See the class."""
        return {
            "epoch_means_2T": torch.zeros(2, len(tasks)),
            "num_epochs_T": torch.zeros(len(tasks), dtype=torch.int64),
            "running_mean_T": torch.zeros(len(tasks)),
            "num_windows_T": torch.zeros(len(tasks), dtype=torch.int64),
        }

    def propose(self, window: Window, state: State) -> Tensor:
        """See the class."""
        older_T, newer_T = state["epoch_means_2T"]
        rates_T = torch.where(state["num_epochs_T"] < 2, 1.0, newer_T / older_T.clamp_min(SMALLEST_LOSS))
        return window.present_T.sum() * masked_softmax(rates_T / self.temperature, window.present_T)

    def observe(self, losses_T: Tensor, present_T: Tensor, state: State) -> None:
        """Take one window into the running means; a loss that is not finite is no loss."""
        counted_T = present_T & losses_T.isfinite()
        num_windows_T = state["num_windows_T"].add_(counted_T)
        change_T = (losses_T - state["running_mean_T"]) / num_windows_T.clamp_min(1)
        state["running_mean_T"].add_(torch.where(counted_T, change_T, 0.0))

    def end_epoch(self, state: State) -> None:
        """The running means become the newest epoch's."""
        means_2T, seen_T = state["epoch_means_2T"], state["num_windows_T"] > 0
        rolled_2T = torch.stack([means_2T[1], state["running_mean_T"]])
        means_2T.copy_(torch.where(seen_T, rolled_2T, means_2T))
        state["num_epochs_T"].add_(seen_T)
        state["running_mean_T"].zero_()
        state["num_windows_T"].zero_()
