"""The root module: one micro-batch in; one scalar, the tasks' loss sums and outputs out.

    loss_k = world_size * sum_local(l_k) / N_k        N_k: labels of task k in the whole window
    scalar = combine(weights, loss_1 .. loss_T)

A term k is a task, or a joint loss of several; the tasks come first.

The window is everything that one optimizer step consumes: ranks x accumulation x micro-batch. Engines average
gradients over ranks (hence `world_size`) and sum them over micro-batches, so the gradient is that of the mean
over all labelled samples of the window, however the window is cut and wherever its labels lie.

A task without a label in the window gets the weight 0, and its inputs are masked before, so that every rank
runs every head (a head that only some ranks run stalls or corrupts the gradient exchange) and nothing turns
NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mtl_dist.balance.balancer import Balancer
from mtl_dist.batch import Batch, Outputs
from mtl_dist.engine.precision import AUTOCAST_DTYPES
from mtl_dist.engine.settings import Precision
from mtl_dist.engine.world import World
from mtl_dist.gradients import GradientScale, with_gradient, without_side_effects
from mtl_dist.heartbeat import beat
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.joint import Joint
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


def count_labels(tasks: Mapping[str, Task], batches: Sequence[Batch], joints: Sequence[Joint] = ()) -> Tensor:
    """The loss denominators of this rank's micro-batches, from labels alone: float64 (T,), on the host.

    Those of the tasks, then those of the joint losses.
    """
    counts_T = torch.zeros(len(tasks) + len(joints), dtype=torch.float64)
    for batch in batches:
        for t, (name, task) in enumerate(tasks.items()):
            counts_T[t] += over_labels(task.count, batch, name).double()
        for t, joint in enumerate(joints, start=len(tasks)):
            counts_T[t] += joint.count(batch).double()
    return counts_T


def over_labels(part: Callable[..., Tensor], batch: Batch, name: str) -> Tensor:
    """A task's count or loss sum over its labels in the batch: over both of each blended sample."""
    own, labelled_B = batch.targets[name], batch.labelled[name]
    if batch.lam_B is None or name not in batch.partners:
        return part(own, labelled_B)
    return part(own, labelled_B, batch.lam_B) + part(batch.partners[name], labelled_B, 1 - batch.lam_B)


Features: TypeAlias = list[dict[str, Tensor]]
"""By term, in order: the features that its heads read."""


@dataclass(frozen=True)
class Weights:
    """How a window's losses become one scalar, and what the shared part's gradient is made of.

    loss_T       what multiplies each task's loss, float32; 0 for an absent task
    shared_T     what multiplies each task's gradient once more where it leaves the features for the shared
                 part; None: nothing
    gradient_P   the gradient of the shared parameters, weighted and summed already. They get this one, and
                 the backward ends at the features
    """

    loss_T: Tensor
    shared_T: Tensor | None = None
    gradient_P: Tensor | None = None


Solve: TypeAlias = Callable[[Batch, Features, Tensor], Weights]
"""`solve(batch, features, losses_T)`: the weights, found within a forward from what that has computed."""


def decided_by(tasks: Mapping[str, Task], thresholds: Mapping[str, Mapping[str, float]]) -> dict[str, Task]:
    """The tasks, deciding by thresholds that were chosen on a split, by task and label."""
    chosen = {name: tuple(labels.values()) for name, labels in thresholds.items()}
    return {
        name: replace(task, chosen=chosen[name]) if name in chosen else task for name, task in tasks.items()
    }


def at_temperatures(tasks: Mapping[str, Task], temperatures: Mapping[str, float]) -> dict[str, Task]:
    """The tasks, whose logits are divided by temperatures that were fitted on a split."""
    return {
        name: replace(task, temperature=temperatures[name]) if name in temperatures else task
        for name, task in tasks.items()
    }


class RootModule(nn.Module):
    """The model, its losses and the method of balancing, behind one `forward`.

    It has no state of a window: what a forward needs to know comes with its arguments, and what it finds is
    returned.
    """

    def __init__(
        self,
        model: MultitaskModel,
        tasks: Mapping[str, Task],
        balancer: Balancer,
        world: World,
        precision: Precision,
        joints: Sequence[Joint] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.balancer = balancer
        self.tasks = dict(tasks)
        self.joints = tuple(joints)
        self.shared = [p for p in model.shared_parameters() if p.requires_grad]
        self._world = world
        self._dtype = AUTOCAST_DTYPES.get(precision)

    @property
    def term_weights(self) -> dict[str, float]:
        """The recipe's weight of each term of the total loss: the tasks, then the joint losses."""
        weights = {name: task.settings.weight for name, task in self.tasks.items()}
        return weights | {joint.name: joint.weight for joint in self.joints}

    @property
    def terms(self) -> dict[str, tuple[str, ...]]:
        """The tasks of each term: of a task itself."""
        return {name: (name,) for name in self.tasks} | {joint.name: joint.tasks for joint in self.joints}

    @property
    def parts(self) -> list[list[nn.Parameter]]:
        """The parameters that are absent together."""
        if not self.joints:
            return [self.task_parameters(task) for task in self.tasks]
        of_balancer = [self.balancer.task_parameters(term) for term in self.terms]
        return [self.model.task_parameters(task) for task in self.tasks] + of_balancer

    def decide_by(self, thresholds: Mapping[str, Mapping[str, float]]) -> None:
        """Let tasks decide by thresholds that were chosen on a split, by task and label."""
        self.tasks = decided_by(self.tasks, thresholds)

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters that no other task's loss reaches: head, own backbone, balancing state."""
        return self.model.task_parameters(task) + self.balancer.task_parameters(task)

    def absent_parameters(self, totals: WindowTotals) -> list[nn.Parameter]:
        """The parameters that no term with a label in the window reaches."""
        present = totals.present_T.tolist()
        here = {term for term, is_here in zip(self.terms, present, strict=True) if is_here}
        reached = {task for term in here for task in self.terms[term]}
        heads = [p for task in self.tasks if task not in reached for p in self.model.task_parameters(task)]
        return heads + [
            p for term in self.terms if term not in here for p in self.balancer.task_parameters(term)
        ]

    def predict(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The model's outputs under this run's precision, as float32."""
        with self._autocast():
            outputs = self.model(images_BCHW)
        return {name: output.float() for name, output in outputs.items()}

    def forward(
        self, batch: Batch, totals: WindowTotals, weights: Weights | Solve
    ) -> tuple[Tensor, Tensor, Outputs]:
        """One micro-batch's scalar, each task's loss sum over it, float32 (T,), and its output, float32.

        Sums and outputs are detached. The gradient of the scalar is what the engine averages over the ranks.
        Where `weights` are still to be found, they are from this very forward, which is the only one of its
        window.
        """
        has_scale = self.balancer.level is not None and self.model.heads_follow_features
        gradient_scale = GradientScale() if has_scale else None
        features = self.features(batch, gradient_scale)
        losses_T, sums_T, outputs = self.losses(features, batch, totals)
        if not isinstance(weights, Weights):
            weights = weights(batch, features, losses_T)
        if gradient_scale is not None:
            gradient_scale.scale_T = weights.shared_T
            gradient_scale.closed = weights.gradient_P is not None
        scale = 1 / totals.num_micro_batches
        # 1, or NaN where a loss is not finite: that reaches every gradient, and every rank once they are
        # averaged, which is how the ranks agree to skip the step.
        poison = 1 + 0 * sums_T.detach().sum()
        present_T = totals.present_T.to(losses_T.device)
        scalar = self.balancer.combine(losses_T, weights.loss_T, present_T, scale)
        if weights.gradient_P is not None:
            own_P = weights.gradient_P if scale == 1 else scale * weights.gradient_P
            scalar = with_gradient(scalar, self.shared, own_P)
        beat("the backward")
        return scalar * poison, sums_T.detach(), {name: output.detach() for name, output in outputs.items()}

    def features(self, batch: Batch, gradient_scale: GradientScale | None) -> Features:
        """The features of each term, behind the factor that its gradient will meet there."""
        with self._autocast():
            shared = self.model.features(batch.images_BCHW)
        features = [
            {name: shared[name] for task in tasks for name in self.model.feature_names(task)}
            for tasks in self.terms.values()
        ]
        if gradient_scale is None:
            return features
        return [gradient_scale.applied(own, t) for t, own in enumerate(features)]

    def losses(
        self, features: Features, batch: Batch, totals: WindowTotals
    ) -> tuple[Tensor, Tensor, Outputs]:
        """The terms' losses and loss sums, both (T,), and the tasks' outputs, float32.

        The losses are scaled such that their mean over ranks, summed over the window's micro-batches, is the
        global loss.
        """
        of_tasks = features[: len(self.tasks)]
        outputs = {task: self._head(task, own, batch) for task, own in zip(self.tasks, of_tasks, strict=True)}
        of_joints = [
            self._outputs_of(joint, own, dict(zip(self.tasks, of_tasks, strict=True)), outputs, batch)
            for joint, own in zip(self.joints, features[len(self.tasks) :], strict=True)
        ]
        sums_T = self.loss_sums(outputs, batch, of_joints)
        scale_T = torch.where(totals.present_T, self._world.size / totals.counts_T, 0.0)
        return sums_T * scale_T.to(sums_T), sums_T, outputs

    def _head(self, task: str, features: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """What a head says of its features, float32."""
        size = (batch.images_BCHW.shape[2], batch.images_BCHW.shape[3])
        with self._autocast():
            return self.model.head_forward(task, dict(features), size).float()

    def _outputs_of(
        self,
        joint: Joint,
        features: Mapping[str, Tensor],
        of_tasks: Mapping[str, Mapping[str, Tensor]],
        outputs: Outputs,
        batch: Batch,
    ) -> Outputs:
        """The outputs that a joint loss sees: those of the tasks or, where gradients are told apart at the
        features, those of the same heads on its own features, once more and without a trace."""
        read = {task: self.model.feature_names(task) for task in joint.tasks}
        if all(features[n] is of_tasks[task][n] for task, names in read.items() for n in names):
            return {task: outputs[task] for task in joint.tasks}
        with without_side_effects(self.model, self._world.device):
            return {
                task: self._head(task, {name: features[name] for name in names}, batch)
                for task, names in read.items()
            }

    def loss_sums(
        self, outputs: Mapping[str, Tensor], batch: Batch, of_joints: Sequence[Outputs] = ()
    ) -> Tensor:
        """Each term's summed loss over the labelled samples of `batch`: float32 (T,).

        `of_joints` are the outputs that each joint loss sees, where these are others.
        """
        sums = [
            over_labels(partial(task.loss_sum, outputs[name]), batch, name)
            for name, task in self.tasks.items()
        ]
        seen: Sequence[Mapping[str, Tensor]] = of_joints or [outputs] * len(self.joints)
        for joint, own in zip(self.joints, seen, strict=True):
            sums.append(joint.loss_sum(own, batch))
        return torch.stack(sums)

    def labelled(self, batch: Batch) -> Tensor:
        """Which samples each term counts, bool (T, B)."""
        of_tasks = [batch.labelled[name] for name in self.tasks]
        return torch.stack([*of_tasks, *(joint.used(batch) for joint in self.joints)])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, self._dtype, enabled=self._dtype is not None)
