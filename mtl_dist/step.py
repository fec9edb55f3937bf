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

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl_dist.balance.balancer import Balancer, Needs
from mtl_dist.balance.jacobian import JacobianBalancer
from mtl_dist.batch import Batch
from mtl_dist.engine.precision import AUTOCAST_DTYPES, Precision
from mtl_dist.engine.world import World
from mtl_dist.gradients import WindowGradients, as_if_unseen, gated
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.task import Task


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
    """The model, its losses and the balancing of them, behind one `forward`.

    Balancing happens in the forward of a window's first micro-batch, where the method asks for it: the tasks'
    gradients are read by `autograd.grad`, the weights found, and one scalar returned whose single backward
    applies them. A window of several micro-batches is looked at beforehand, by `look_at`.
    """

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
        self._shared = [p for p in model.shared_parameters() if p.requires_grad]
        self._weights_T = torch.ones(len(tasks))
        # Read in the backward, written before it; None where heads and shared part get the same weights.
        self._gates_T = None if balancer.scale_heads else torch.ones(len(tasks), device=world.device)
        self._aggregate_P: Tensor | None = None
        self._weighed_step = -1
        self.gathered_heads: Callable[[], AbstractContextManager[None]] | None = None
        """Set where the engine divides the weights over the ranks: a context in which the heads are whole."""
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
        with self._autocast():
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
        weigh = self._weighed_step != totals.step
        needs = self.balancer.needs_at(totals.step) if weigh else "nothing"
        if needs != "nothing" and self._gates_T is not None:
            self._gates_T.fill_(1.0)
        losses_T, features = self._losses(batch, totals)
        if weigh:
            looked = None
            if needs != "nothing":
                looked = WindowGradients(len(self.tasks), self._world)
                self._add(looked, needs, losses_T, features, batch, totals)
            self._weigh(looked, needs, totals)
        share = 1 / totals.num_micro_batches
        present_T = totals.present_T.to(losses_T.device)
        scalar = self.balancer.combine(losses_T, self._weights_T, present_T, share)
        if self._aggregate_P is not None:
            parts = self._aggregate_P.split([p.numel() for p in self._shared])
            products = [(p * part.view_as(p)).sum() for p, part in zip(self._shared, parts, strict=True)]
            scalar = scalar + share * torch.stack(products).sum()
        return scalar

    def observe(self, local_sums_T: Tensor, totals: WindowTotals) -> None:
        """Let the balancer learn a finished window's global losses, where it wants them.

        `local_sums_T` are this rank's loss sums over the window's micro-batches.
        """
        if self.balancer.observes:
            losses_T = self._world.device_sum(local_sums_T) / totals.counts_T.to(local_sums_T)
            self.balancer.observe(losses_T, totals.present_T.to(losses_T.device))

    # ------------------------------------------------------------------ losses
    def _losses(self, batch: Batch, totals: WindowTotals) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The tasks' losses (T,), and the features that each task's head read.

        The losses are scaled such that their mean over ranks, summed over the window's micro-batches, is the
        global loss.
        """
        with self._autocast():
            shared = self.model.features(batch.images_BCHW)
        features = [{name: shared[name] for name in self.model.feature_names(task)} for task in self.tasks]
        if self._gates_T is not None:
            gates = self._gates_T.unbind()
            features = [gated(own, gate) for own, gate in zip(features, gates, strict=True)]
        return self._head_losses(features, batch, totals), features

    def _head_losses(
        self, features: Sequence[Mapping[str, Tensor]], batch: Batch, totals: WindowTotals
    ) -> Tensor:
        size = (batch.images_BCHW.shape[2], batch.images_BCHW.shape[3])
        with self._autocast():
            outputs = {
                task: self.model.head_forward(task, dict(own), size).float()
                for task, own in zip(self.tasks, features, strict=True)
            }
        sums_T = self.loss_sums(outputs, batch)
        self.local_sums_T = sums_T.detach()
        share_T = torch.where(totals.present_T, self._world.size / totals.counts_T, 0.0)
        return sums_T * share_T.to(sums_T)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, self._dtype, enabled=self._dtype is not None)

    # ------------------------------------------------------------------ balancing
    def look_at(self, window: Sequence[Batch], totals: WindowTotals) -> None:
        """Find the weights of a window of several micro-batches, before its first forward.

        Costs one more forward of each, and leaves random state and BatchNorm's statistics as they were.
        """
        needs = self.balancer.needs_at(totals.step)
        if needs == "nothing":
            return
        looked = WindowGradients(len(self.tasks), self._world)
        with as_if_unseen(self, self._world.device):
            for batch in window:
                losses_T, features = self._losses(batch, totals)
                self._add(looked, needs, losses_T, features, batch, totals)
        self._weigh(looked, needs, totals)

    def _add(
        self,
        looked: WindowGradients,
        needs: Needs,
        losses_T: Tensor,
        features: Sequence[Mapping[str, Tensor]],
        batch: Batch,
        totals: WindowTotals,
    ) -> None:
        """Take one micro-batch into what is looked at."""
        present = totals.present_T.tolist()
        looked.add_losses(losses_T)
        if needs == "jacobian" or (needs == "gramian" and self.balancer.level == "parameters"):
            looked.add_at_parameters(losses_T, self._shared, present)
        elif needs == "gramian":
            if self.gathered_heads is not None:
                # The heads' weights are divided over the ranks: they are gathered, and the heads run once
                # more on features of their own, so that no hook of the engine sees this backward.
                features = [
                    {name: feature.detach().requires_grad_() for name, feature in own.items()}
                    for own in features
                ]
                with self.gathered_heads():
                    losses_T = self._head_losses(features, batch, totals)
                    looked.add_at_features(losses_T, features, present)
            else:
                looked.add_at_features(losses_T, features, present)

    def _weigh(self, looked: WindowGradients | None, needs: Needs, totals: WindowTotals) -> None:
        """Find this window's weights."""
        key = (self._seed, totals.step)
        present_T = totals.present_T.to(self._world.device)
        losses_T = looked.global_losses() if looked is not None else None
        gramian_TT = None
        self._aggregate_P = None
        if looked is not None and needs == "gramian":
            assert self.balancer.level is not None
            gramian_TT = looked.global_gramian(self.balancer.level)
        if looked is not None and needs == "jacobian":
            assert isinstance(self.balancer, JacobianBalancer) and losses_T is not None
            self._aggregate_P = self.balancer.aggregate(
                looked.global_jacobian(), losses_T=losses_T, present_T=present_T, key=key
            )
        weights_T = self.balancer.weights(
            present_T=present_T, key=key, losses_T=losses_T, gramian_TT=gramian_TT
        )
        if self._gates_T is not None:
            # The shared part gets weighted gradients (or none: the aggregate takes their place), the heads
            # plain ones.
            self._gates_T.copy_(weights_T if self._aggregate_P is None else torch.zeros_like(weights_T))
            weights_T = present_T.float()
        self._weights_T = weights_T
        self._weighed_step = totals.step
