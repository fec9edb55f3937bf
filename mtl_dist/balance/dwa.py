"""Dynamic weight average."""

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


class DWASettings(MethodSettings):
    """`balance: {method: dwa, temperature: 2.0}`; a higher temperature is nearer to equal weights."""

    method: Literal["dwa"] = "dwa"
    temperature: float = Field(default=2.0, gt=0)


class DWA(Balancer):
    """More weight for the tasks whose loss falls slowly (https://arxiv.org/abs/1803.10704).

        w_k = T softmax(r / temperature)_k,    r_k = L_k(t-1) / L_k(t-2)

    with L_k(t) the mean loss of task k in epoch t; r_k = 1 until the task has two epochs.

    Where we differ: the means are of global losses over the windows in which the task was present, and a
    task which was absent for a whole epoch keeps its history; the softmax is over the present tasks, times
    their number.

    State: `epoch_means_2T` (older, newer), `num_epochs_T`, and the running epoch's mean and windows.
    """

    needs = "nothing"
    observes = True

    epoch_means_2T: Tensor
    num_epochs_T: Tensor
    running_mean_T: Tensor
    num_windows_T: Tensor

    def __init__(self, settings: DWASettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        self.temperature = settings.temperature
        num_tasks = len(tasks)
        self.register_buffer("epoch_means_2T", torch.zeros(2, num_tasks))
        self.register_buffer("num_epochs_T", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("running_mean_T", torch.zeros(num_tasks))
        self.register_buffer("num_windows_T", torch.zeros(num_tasks, dtype=torch.int64))

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        older_T, newer_T = self.epoch_means_2T
        rates_T = torch.where(self.num_epochs_T < 2, 1.0, newer_T / older_T.clamp_min(SMALLEST_LOSS))
        return present_T.sum() * masked_softmax(rates_T / self.temperature, present_T)

    @torch.no_grad()
    def observe(self, losses_T: Tensor, present_T: Tensor) -> None:
        """Take one window into the running means; a loss that is not finite is no loss."""
        counted_T = present_T & losses_T.isfinite()
        self.num_windows_T += counted_T
        change_T = (losses_T - self.running_mean_T) / self.num_windows_T.clamp_min(1)
        self.running_mean_T += torch.where(counted_T, change_T, 0.0)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """The running means become the newest epoch's."""
        seen_T = self.num_windows_T > 0
        rolled_2T = torch.stack([self.epoch_means_2T[1], self.running_mean_T])
        self.epoch_means_2T.copy_(torch.where(seen_T, rolled_2T, self.epoch_means_2T))
        self.num_epochs_T += seen_T
        self.running_mean_T.zero_()
        self.num_windows_T.zero_()
