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

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mtl_dist.balance.balancer import Balancer
from mtl_dist.balance.diagnostics import GradientDiagnostics, diagnose
from mtl_dist.balance.method import Level, Needs
from mtl_dist.batch import Batch
from mtl_dist.engine.engine import Engine
from mtl_dist.engine.precision import AUTOCAST_DTYPES, LossScaler
from mtl_dist.engine.settings import Precision
from mtl_dist.engine.world import World
from mtl_dist.gradients import Gates, JacobianMemory, WindowGradients, as_if_unseen, products, with_gradient
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.task import Task

logger = logging.getLogger(__name__)


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
            counts_T[t] += _over_labels(task.count, batch, name).double()
    return counts_T


def _over_labels(part: Callable[..., Tensor], batch: Batch, name: str) -> Tensor:
    """A task's count or loss sum over its labels in the batch: over both of each blended sample."""
    own, labelled_B = batch.targets[name], batch.labelled[name]
    if batch.shares_B is None or name not in batch.partners:
        return part(own, labelled_B)
    return part(own, labelled_B, batch.shares_B) + part(batch.partners[name], labelled_B, 1 - batch.shares_B)


class RootModule(nn.Module):
    """The model, its losses and the balancing of them, behind one `forward`.

    Balancing happens in the forward of a window's first micro-batch, where the method asks for it: the tasks'
    gradients are read by `autograd.grad`, the weights found, and one scalar returned whose single backward
    applies them. A window of several micro-batches is looked at beforehand, by `look_at`.

    How the weights w reach the shared part:

        level features      w multiplies each task's gradient where it leaves the features (a gate), or the
                            task's loss where the heads are to be weighted too (`scale_heads`)
        level parameters    the gradients are there already: sum_k w_k g_k is handed to the parameters, the
                            gates are closed, and the shared part's backward is not run once more

    Every `diagnose_every` steps (0: never) the tasks' gradients are compared, whatever the method.
    """

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Mapping[str, Task],
        balancer: Balancer,
        world: World,
        precision: Precision,
        seed: int,
        diagnose_every: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.balancer = balancer
        self.tasks = dict(tasks)
        self._world = world
        self._dtype = AUTOCAST_DTYPES.get(precision)
        self._seed = seed
        self.shared = [p for p in model.shared_parameters() if p.requires_grad]
        self._scaler: LossScaler | None = None
        self._engine: Engine | None = None
        self._diagnose_every = diagnose_every if self.why_no_diagnosis is None else 0
        # ---- of the window under way
        self._weighed_step = -1
        self._weights_T = torch.ones(len(tasks))
        self._gates = None if balancer.level is None else Gates(len(tasks), world.device)
        self._memory = JacobianMemory()
        self._gradient_P: Tensor | None = None
        self._diagnosed: WindowGradients | None = None
        self._found: tuple[Tensor, Tensor] | None = None
        self._told_of_strangers = False
        self.local_sums_T = torch.zeros(len(tasks))
        """Each task's loss sum over this rank's last micro-batch, for the log. Not a buffer: not state."""

    def served_by(self, engine: Engine) -> None:
        """Learn which engine runs this module: its loss scale, and how it makes divided weights whole."""
        self._scaler = engine.scaler
        self._engine = engine if engine.zero_stage == 3 else None

    @property
    def task_weights(self) -> dict[str, float]:
        """The recipe's weight of each task."""
        return {name: task.settings.weight for name, task in self.tasks.items()}

    @property
    def why_no_diagnosis(self) -> str | None:
        """Why the tasks' gradients cannot be compared at the features; None where they can."""
        if len(self.tasks) < 2:
            return "there is one task alone"
        if not self.shared:
            return "the tasks share no weights that are trained"
        names = [name for task in self.tasks for name in self.model.feature_names(task)]
        if len(names) == len(set(names)):
            return "no two heads read the same features"
        return None

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
                _over_labels(partial(task.loss_sum, outputs[name]), batch, name)
                for name, task in self.tasks.items()
            ]
        )

    def forward(self, batch: Batch, totals: WindowTotals) -> Tensor:
        """The scalar of one micro-batch, whose gradient the engine averages over ranks."""
        step = totals.step
        looked: WindowGradients | None = None
        needs: Needs = "nothing"
        if self._weighed_step != step:
            looked, needs = self._begin_look(), self.balancer.needs_at(step)
        level = self._level_of(needs)
        at_features = looked if level == "features" else self._diagnosed_at(step)
        losses_T = self._losses(batch, totals, at_features, looked if level == "parameters" else None)
        if looked is not None:
            looked.add_losses(losses_T)
            self._weigh(looked, needs, totals)
        share = 1 / totals.num_micro_batches
        present_T = totals.present_T.to(losses_T.device)
        scalar = self.balancer.combine(losses_T, self._weights_T, present_T, share)
        if self._gradient_P is not None:
            own_P = self._gradient_P if share == 1 else share * self._gradient_P
            scalar = with_gradient(scalar, self.shared, own_P)
        return scalar

    def observe(self, local_sums_T: Tensor, totals: WindowTotals) -> None:
        """Let the balancer learn a finished window's global losses, where it wants them.

        `local_sums_T` are this rank's loss sums over the window's micro-batches.
        """
        if self.balancer.observes:
            losses_T = self._world.device_sum(local_sums_T) / totals.counts_T.to(local_sums_T)
            self.balancer.observe(losses_T, totals.present_T.to(losses_T.device))

    def diagnosis(self, totals: WindowTotals) -> GradientDiagnostics | None:
        """Collective: how the tasks' gradients stood to one another in the window just finished.

        None where this was no step to look.
        """
        if not self._diagnoses_at(totals.step):
            return None
        if self._diagnosed is not None:
            self._found = self._diagnosed.global_gramian("features"), self._diagnosed.comparable()
            self._diagnosed = None
        assert self._found is not None
        gramian_TT, comparable_TT = self._found
        return diagnose(list(self.tasks), gramian_TT, totals.present_T, comparable_TT)

    # ------------------------------------------------------------------ losses
    def _losses(
        self,
        batch: Batch,
        totals: WindowTotals,
        at_features: WindowGradients | None,
        at_parameters: WindowGradients | None,
    ) -> Tensor:
        """The tasks' losses (T,), whose gradients are taken into what is given.

        The losses are scaled such that their mean over ranks, summed over the window's micro-batches, is the
        global loss.
        """
        features = self._features(batch)
        present = totals.present_T.tolist()
        if at_features is not None and self._engine is not None:
            self._look_apart(at_features, features, batch, totals)
        losses_T = self._head_losses(features, batch, totals)
        if at_features is not None and self._engine is None:
            at_features.add_at_features(losses_T, features, present, self._labelled(batch))
        if at_parameters is not None:
            at_parameters.add_at_parameters(losses_T, self.shared, present)
        return losses_T

    def _features(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The features that each task's head reads, behind its gate."""
        with self._autocast():
            shared = self.model.features(batch.images_BCHW)
        features = [{name: shared[name] for name in self.model.feature_names(task)} for task in self.tasks]
        if self._gates is None:
            return features
        return [self._gates.gated(own, t) for t, own in enumerate(features)]

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

    def _labelled(self, batch: Batch) -> Tensor:
        return torch.stack([batch.labelled[name] for name in self.tasks])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, self._dtype, enabled=self._dtype is not None)

    # ------------------------------------------------------------------ looking at gradients
    def look_at(self, window: Sequence[Batch], totals: WindowTotals) -> None:
        """Find the weights of a window of several micro-batches, before its first forward.

        Costs one more forward of each, and leaves random state and BatchNorm's statistics as they were.
        """
        needs = self.balancer.needs_at(totals.step)
        if needs == "nothing":
            return
        level = self._level_of(needs)
        looked = self._begin_look()
        whole = self._engine.evaluating() if self._engine is not None else nullcontext()
        with whole, as_if_unseen(self, self._world.device):
            for batch in window:
                if level == "features" and self._engine is not None:
                    with torch.no_grad():
                        features = self._features(batch)
                    losses_T = self._look_apart(looked, features, batch, totals)
                else:
                    with torch.set_grad_enabled(level is not None):
                        losses_T = self._losses(
                            batch,
                            totals,
                            looked if level == "features" else None,
                            looked if level == "parameters" else None,
                        )
                looked.add_losses(losses_T)
        self._weigh(looked, needs, totals)

    def _begin_look(self) -> WindowGradients:
        """An empty record of gradients, read with all gates open."""
        if self._gates is not None:
            self._gates.open(torch.ones_like(self._gates.factors_T))
        return self._new_record()

    def _new_record(self) -> WindowGradients:
        scale = 1.0 if self._scaler is None else self._scaler.scale
        return WindowGradients(len(self.tasks), self._world, scale, self._memory)

    def _level_of(self, needs: Needs) -> Level | None:
        return self.balancer.level if needs in ("gramian", "jacobian") else None

    def _look_apart(
        self,
        record: WindowGradients,
        features: Sequence[Mapping[str, Tensor]],
        batch: Batch,
        totals: WindowTotals,
    ) -> Tensor:
        """Take the gradients at the features where the weights are divided over the ranks; the losses (T,).

        The heads are made whole and run once more, on features of their own, so that no hook of the engine
        sees this backward.
        """
        assert self._engine is not None
        leaves = [
            {name: feature.detach().requires_grad_() for name, feature in own.items()} for own in features
        ]
        weights = [parameter for task in self.tasks for parameter in self.model.task_parameters(task)]
        with as_if_unseen(self, self._world.device), torch.enable_grad(), self._engine.whole(weights):
            losses_T = self._head_losses(leaves, batch, totals)
            record.add_at_features(losses_T, leaves, totals.present_T.tolist(), self._labelled(batch))
        return losses_T.detach()

    def _weigh(self, looked: WindowGradients, needs: Needs, totals: WindowTotals) -> None:
        """Collective where the method needs anything: find this window's weights, and set them up."""
        key = (self._seed, totals.step)
        present_T = totals.present_T.to(self._world.device)
        level = self._level_of(needs)
        losses_T = looked.global_losses() if needs != "nothing" else None
        gramian_TT = looked.global_gramian(level) if needs == "gramian" and level is not None else None
        weights_T = self.balancer.weights(
            present_T=present_T, key=key, losses_T=losses_T, gramian_TT=gramian_TT
        )
        self._gradient_P = None
        self._found = None
        if gramian_TT is not None:
            comparable_TT = (
                looked.comparable() if level == "features" else torch.ones_like(gramian_TT, dtype=torch.bool)
            )
            self._found = gramian_TT, comparable_TT
            self._tell_of_strangers(present_T, comparable_TT)
            if level == "parameters":
                self._gradient_P = weights_T @ looked.local_jacobian
        elif needs == "jacobian":
            assert losses_T is not None
            jacobian_TP = looked.global_jacobian()
            self._gradient_P = self.balancer.aggregate(
                jacobian_TP, losses_T=losses_T, present_T=present_T, key=key
            )
            if self._diagnoses_at(totals.step):
                gramian_TT = products(jacobian_TP)
                self._found = gramian_TT, torch.ones_like(gramian_TT, dtype=torch.bool)
        if self._gates is not None:
            self._gates.closed = self._gradient_P is not None
            if not self.balancer.scale_heads:
                # The heads get the plain gradients of their own losses.
                self._gates.factors_T.copy_(weights_T)
                weights_T = present_T.float()
        self._weights_T = weights_T
        self._weighed_step = totals.step

    def _tell_of_strangers(self, present_T: Tensor, comparable_TT: Tensor) -> None:
        """Say once that a window held tasks between which the features can show no conflict."""
        strangers_TT = present_T[:, None] & present_T[None, :] & ~comparable_TT
        if self._told_of_strangers or not self._world.is_main or not strangers_TT.any():
            return
        first, second = strangers_TT.nonzero()[0].tolist()
        names = list(self.tasks)
        logger.warning(
            "balance: a window held no sample with labels of both %s and %s: at the features no conflict "
            "between them can be seen. If this is common, set balance.level to parameters.",
            names[first],
            names[second],
        )
        self._told_of_strangers = True

    # ------------------------------------------------------------------ diagnosis
    def _diagnoses_at(self, step: int) -> bool:
        return self._diagnose_every > 0 and step % self._diagnose_every == 0

    def _diagnosed_at(self, step: int) -> WindowGradients | None:
        """Where the gradients at the features go in a step which compares them though the method does not."""
        if not self._diagnoses_at(step) or self._level_of(self.balancer.needs_at(step)) is not None:
            return None
        if self._diagnosed is None:
            self._diagnosed = self._new_record()
        return self._diagnosed
