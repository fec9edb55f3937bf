"""The weights of a window: `weights = balancing.solve(window, totals)`.

What the method asks for is computed (the tasks' losses, their gradients at the features or at the shared
parameters), the method solves, and the root module's forward applies what comes out.

    window of several micro-batches    one more forward of each, before the training forwards
    window of one micro-batch          within its training forward, which is not run twice: the weights that
                                       `solve` returns are then a function, which the forward calls with its
                                       features and losses

The gradients are read by `autograd.grad`, so that the engine sees exactly one backward per micro-batch. How
the weights w reach the shared part:

    level features      w multiplies each task's gradient where it leaves the features, or the task's loss
                        where the heads are to be weighted too (`scale_heads`)
    level parameters    the gradients are there already: sum_k w_k g_k is handed to the parameters, and the
                        shared part's backward is not run once more

Every `diagnose_every` steps (0: never) the tasks' gradients are compared, whatever the method.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from mtl_dist.balance.diagnostics import GradientDiagnostics, diagnose
from mtl_dist.balance.evidence import ConflictWatch
from mtl_dist.balance.method import Level, Needs
from mtl_dist.batch import Batch
from mtl_dist.engine.engine import Engine
from mtl_dist.gradients import (
    GradientScale,
    JacobianMemory,
    WindowGradients,
    WindowSums,
    products,
    without_side_effects,
)
from mtl_dist.step import Features, RootModule, Solve, Weights, WindowTotals

logger = logging.getLogger(__name__)


class Balancing:
    """Solves for the weights of one window after the other; every rank calls it alike.

    `seed` and the step are the key of a method's random choices.
    """

    def __init__(self, root: RootModule, engine: Engine, seed: int, diagnose_every: int = 0) -> None:
        self.root = root
        self.balancer = root.balancer
        self.engine = engine
        self._world = engine.world
        self._seed = seed
        self._diagnose_every = diagnose_every if self.why_no_diagnosis is None else 0
        self._memory = JacobianMemory()
        self._compared: WindowGradients | None = None
        """The gradients at the features in a step which compares them though the method does not."""
        self._gramian: tuple[Tensor, Tensor] | None = None
        """The last solve's Gramian, and which tasks it compares."""
        self.conflicts = ConflictWatch()
        """Of this process: it starts at zero when a run is resumed."""
        self._warned = False

    @property
    def why_no_diagnosis(self) -> str | None:
        """Why the tasks' gradients cannot be compared at the features; None where they can."""
        tasks, model = self.root.tasks, self.root.model
        if len(tasks) < 2:
            return "there is one task alone"
        if not self.root.shared:
            return "the tasks share no weights that are trained"
        if not model.compared_at_features:
            return "the tasks meet before the features too"
        names = [name for task in tasks for name in model.feature_names(task)]
        if len(names) == len(set(names)):
            return "no two heads read the same features"
        return None

    # ------------------------------------------------------------------ the weights
    def solve(self, window: Sequence[Batch], totals: WindowTotals) -> Weights | Solve:
        """Collective: the weights for this rank's micro-batches of one window, once per window.

        Several micro-batches cost one more forward of each, which leaves random state and BatchNorm's
        statistics as they were.
        """
        needs = self.balancer.needs_at(totals.step)
        level = self.balancer.level if needs in ("gramian", "jacobian") else None
        self._gramian = None
        self._compared = self._new_record() if self._diagnoses_at(totals.step) and level is None else None
        record = self._new_record()
        if needs == "nothing" or len(window) > 1:
            if needs != "nothing":
                self._extra_forwards(record, window, totals, level)
            return self._compare_with(self._weights(record, needs, totals), totals)

        def solve_within(batch: Batch, features: Features, losses_T: Tensor) -> Weights:
            record.add_losses(losses_T)
            if level is not None:
                self._read(record, level, batch, features, losses_T, totals)
            if self._compared is not None:
                self._read(self._compared, "features", batch, features, losses_T, totals)
            return self._weights(record, needs, totals)

        return solve_within

    def _compare_with(self, weights: Weights, totals: WindowTotals) -> Weights | Solve:
        """Known weights, and in a step that compares gradients a look at those of every forward."""
        compared = self._compared
        if compared is None:
            return weights

        def look(batch: Batch, features: Features, losses_T: Tensor) -> Weights:
            self._read(compared, "features", batch, features, losses_T, totals)
            return weights

        return look

    def _weights(self, record: WindowGradients, needs: Needs, totals: WindowTotals) -> Weights:
        """Collective where the method needs anything: its weights, and what they multiply."""
        key = (self._seed, totals.step)
        balancer = self.balancer
        present_T = totals.present_T.to(self._world.device)
        if needs == "nothing":
            # A learned method reads its parameters.
            with self.engine.whole(list(balancer.parameters())):
                return self._applied(balancer.weights(present_T=present_T, key=key), present_T)
        level = balancer.level if needs == "gramian" else None
        sums = record.over_ranks(level)
        weights_T = balancer.weights(
            present_T=present_T, key=key, losses_T=sums.losses_T, gramian_TT=sums.gramian_TT
        )
        gradient_P: Tensor | None = None
        if level is not None:
            self._remember(sums, present_T)
            if level == "parameters":
                gradient_P = weights_T @ record.local_jacobian
        elif needs == "jacobian":
            jacobian_TP = record.global_jacobian()
            gradient_P = balancer.aggregate(jacobian_TP, losses_T=sums.losses_T, present_T=present_T, key=key)
            if self._diagnoses_at(totals.step):
                gramian_TT = products(jacobian_TP)
                self._gramian = gramian_TT, torch.ones_like(gramian_TT, dtype=torch.bool)
        applied = self._applied(weights_T, present_T, gradient_P)
        if gradient_P is not None and not self.root.model.heads_follow_features:
            # No place keeps the losses' own gradients from the shared parameters: they are taken out here.
            return replace(applied, gradient_P=gradient_P - applied.loss_T @ record.local_jacobian)
        return applied

    def _applied(self, weights_T: Tensor, present_T: Tensor, gradient_P: Tensor | None = None) -> Weights:
        if self.balancer.scale_heads:
            return Weights(weights_T, gradient_P=gradient_P)
        # The heads get the plain gradients of their own losses.
        return Weights(present_T.float(), shared_T=weights_T, gradient_P=gradient_P)

    def _remember(self, sums: WindowSums, present_T: Tensor) -> None:
        """Keep the Gramian for a diagnosis, and warn once of tasks that have no conflict to show in it."""
        assert sums.gramian_TT is not None and sums.comparable_TT is not None
        self._gramian = sums.gramian_TT, sums.comparable_TT
        if self._warned or not self._world.is_main:
            return
        disjoint_TT = present_T[:, None] & present_T[None, :] & ~sums.comparable_TT
        if not disjoint_TT.any():
            return
        first, second = disjoint_TT.nonzero()[0].tolist()
        names = list(self.root.terms)
        logger.warning(
            "balance: a window held no sample with labels of both %s and %s: at the features no conflict "
            "between them can be seen. If this is common, set balance.level to parameters.",
            names[first],
            names[second],
        )
        self._warned = True

    # ------------------------------------------------------------------ reading gradients
    def _new_record(self) -> WindowGradients:
        scaler = self.engine.scaler
        return WindowGradients(
            len(self.root.terms), self._world, 1.0 if scaler is None else scaler.scale, self._memory
        )

    def _extra_forwards(
        self, record: WindowGradients, window: Sequence[Batch], totals: WindowTotals, level: Level | None
    ) -> None:
        """The losses and gradients of all micro-batches, before the training forwards."""
        apart = level == "features" and self.engine.shards_parameters
        whole = self.engine.evaluating() if self.engine.shards_parameters else nullcontext()
        with whole, without_side_effects(self.root, self._world.device):
            for batch in window:
                with torch.set_grad_enabled(level is not None and not apart):
                    scale = GradientScale() if self.balancer.level is not None else None
                    features = self.root.features(batch, scale)
                    if apart:
                        losses_T = self._read_apart(record, batch, features, totals)
                    else:
                        losses_T, _, _ = self.root.losses(features, batch, totals)
                        if level is not None:
                            self._read(record, level, batch, features, losses_T, totals)
                record.add_losses(losses_T)

    def _read(
        self,
        record: WindowGradients,
        level: Level,
        batch: Batch,
        features: Features,
        losses_T: Tensor,
        totals: WindowTotals,
    ) -> None:
        """The tasks' gradients of one micro-batch."""
        present = totals.present_T.tolist()
        if level == "parameters":
            record.add_at_parameters(losses_T, self.root.shared, present)
        elif self.engine.shards_parameters:
            self._read_apart(record, batch, features, totals)
        else:
            record.add_at_features(losses_T, features, present, self.root.labelled(batch))

    def _read_apart(
        self, record: WindowGradients, batch: Batch, features: Features, totals: WindowTotals
    ) -> Tensor:
        """The gradients at the features where the weights are divided over the ranks; the losses (T,).

        The heads are made whole and run once more, on features of their own, so that no hook of the engine
        sees this backward.
        """
        root = self.root
        leaves = [
            {name: feature.detach().requires_grad_() for name, feature in own.items()} for own in features
        ]
        weights = [parameter for task in root.tasks for parameter in root.model.task_parameters(task)]
        with (
            without_side_effects(root, self._world.device),
            torch.enable_grad(),
            self.engine.whole(weights),
        ):
            losses_T, _, _ = root.losses(leaves, batch, totals)
            record.add_at_features(losses_T, leaves, totals.present_T.tolist(), root.labelled(batch))
        return losses_T.detach()

    # ------------------------------------------------------------------ afterwards
    def observe(self, local_sums_T: Tensor, totals: WindowTotals) -> None:
        """Let the method learn a finished window's global losses, where it wants them.

        `local_sums_T` are this rank's loss sums over the window's micro-batches.
        """
        if self.balancer.observes:
            losses_T = self._world.device_sum(local_sums_T) / totals.counts_T.to(local_sums_T)
            self.balancer.observe(losses_T, totals.present_T.to(losses_T.device))

    def diagnosis(self, totals: WindowTotals) -> GradientDiagnostics | None:
        """Collective: how the tasks' gradients stood to one another in the window just finished.

        None where this was no step to compare them.
        """
        if not self._diagnoses_at(totals.step):
            return None
        if self._compared is not None:
            sums = self._compared.over_ranks("features")
            assert sums.gramian_TT is not None and sums.comparable_TT is not None
            self._gramian, self._compared = (sums.gramian_TT, sums.comparable_TT), None
        assert self._gramian is not None
        gramian_TT, comparable_TT = self._gramian
        return diagnose(list(self.root.terms), gramian_TT, totals.present_T, comparable_TT)

    def _diagnoses_at(self, step: int) -> bool:
        return self._diagnose_every > 0 and step % self._diagnose_every == 0
