"""The root module: one micro-batch in, one scalar out.

    loss_k = world_size * sum_local(l_k) / N_k        N_k: labels of task k in the whole window
    scalar = balance(loss_1 .. loss_T)

The window is everything that one optimizer step consumes: ranks x accumulation x micro-batch. Engines average
gradients over ranks (hence `world_size`) and sum them over micro-batches, so the gradient is that of the mean
over all labelled samples of the window, however the window is cut and wherever its labels lie.

A task without a label in the window gets the weight 0, and its inputs are masked before, so that every rank
runs every head (a head that only some ranks run stalls or corrupts the gradient exchange) and nothing turns
NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mtl_dist.balance.balancer import Balancer
from mtl_dist.batch import Batch
from mtl_dist.engine.world import World
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.task import Task

Precision = Literal["fp32", "bf16"]

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16}


@dataclass(frozen=True)
class WindowTotals:
    """What all ranks know of a window before its first forward.

    counts_T   float64 on the host: the labels (or labelled pixels, or class weights) of each task in the
               whole window; 0 for an absent task
    """

    counts_T: Tensor
    num_micro_batches: int
    step: int

    @property
    def present_T(self) -> Tensor:
        return self.counts_T > 0


def count_labels(tasks: Mapping[str, Task], batches: Sequence[Batch]) -> Tensor:
    """The loss denominators of this rank's micro-batches, from labels alone: float64 (T,), on the host."""
    counts_T = torch.zeros(len(tasks), dtype=torch.float64)
    for batch in batches:
        for t, (name, task) in enumerate(tasks.items()):
            counts_T[t] += task.count(batch.targets[name], batch.labelled[name]).double()
    return counts_T


class RootModule(nn.Module):
    """The model, its losses and the balancing of them, behind one `forward`."""

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Mapping[str, Task],
        balancer: Balancer,
        world: World,
        precision: Precision,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.balancer = balancer
        self.tasks = dict(tasks)
        self._world = world
        self._dtype = AUTOCAST_DTYPES.get(precision)
        self._seed = seed
        self._weights_T = torch.ones(len(tasks))
        self._weighed_step = -1
        self.local_sums_T = torch.zeros(len(tasks))
        """Each task's loss sum over this rank's last micro-batch, for the log. Not a buffer: not state."""

    @property
    def task_weights(self) -> dict[str, float]:
        """The recipe's weight of each task."""
        return {name: task.settings.weight for name, task in self.tasks.items()}

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters that no other task's loss reaches: head, own backbone, balancing state."""
        return self.model.task_parameters(task) + self.balancer.task_parameters(task)

    def predict(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The model's outputs under this run's precision, as float32."""
        with torch.autocast(images_BCHW.device.type, self._dtype, enabled=self._dtype is not None):
            outputs = self.model(images_BCHW)
        return {name: output.float() for name, output in outputs.items()}

    def loss_sums(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Each task's summed loss over the labelled samples of `batch`: float32 (T,)."""
        return torch.stack(
            [
                task.loss_sum(outputs[name], batch.targets[name], batch.labelled[name])
                for name, task in self.tasks.items()
            ]
        )

    def forward(self, batch: Batch, totals: WindowTotals) -> Tensor:
        """The scalar of one micro-batch, whose gradient the engine averages over ranks."""
        sums_T = self.loss_sums(self.predict(batch.images_BCHW), batch)
        self.local_sums_T = sums_T.detach()
        share_T = torch.where(totals.present_T, self._world.size / totals.counts_T, 0.0).to(sums_T)
        losses_T = sums_T * share_T
        present_T = totals.present_T.to(sums_T.device)
        if self._weighed_step != totals.step:
            self._weights_T = self.balancer.weights(present_T=present_T, key=(self._seed, totals.step))
            self._weighed_step = totals.step
        return self.balancer.combine(losses_T, self._weights_T, present_T, 1 / totals.num_micro_batches)
