"""The training loop. It receives built parts, never the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.batch_statistics import BatchStatistics
from mtl_dist.checkpoint import Best, Checkpoint, CheckpointWriter
from mtl_dist.data.device_prefetch import device_prefetch
from mtl_dist.ema import Ema
from mtl_dist.engine.engine import Engine
from mtl_dist.evaluator import Evaluation
from mtl_dist.figures.run_figures import RunFigures
from mtl_dist.heartbeat import beat
from mtl_dist.monitor import Monitor
from mtl_dist.optim import OptimSettings, learning_rate_factor, learning_rates, set_learning_rate
from mtl_dist.plural import readable
from mtl_dist.randomness import rank_seed
from mtl_dist.skipping import KeptBuffers, SkippedSteps
from mtl_dist.status import State, Status
from mtl_dist.step import RootModule, WindowTotals, count_labels
from mtl_dist.stopping import StopAsked, StopSignal
from mtl_dist.tracking.tracker import Tracker
from mtl_dist.training.callbacks import Callbacks, Moment
from mtl_dist.training.clock import StepClock
from mtl_dist.training.epoch_table import EpochTable
from mtl_dist.training.plan import Outcome, Plan, windows
from mtl_dist.training.running_losses import RunningLosses
from mtl_dist.training.running_metrics import RunningMetrics, Seen
from mtl_dist.training.saving import Progress, Saving


class Trainer:
    """Trains from the state it is in to the end of the plan, or until it is asked to stop."""

    def __init__(
        self,
        *,
        engine: Engine,
        root: RootModule,
        balancing: Balancing,
        optim: OptimSettings,
        plan: Plan,
        monitor: Monitor,
        ema: Ema | None,
        evaluate: Callable[[], Evaluation] | None,
        writer: CheckpointWriter | None,
        tracker: Tracker,
        figures: RunFigures,
        stop: StopSignal,
        recipe_text: str,
        data_text: str,
        max_bad_steps: int,
        metrics: RunningMetrics | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.engine = engine
        self.root = root
        self.balancing = balancing
        self.statistics = BatchStatistics(root)
        self.world = engine.world
        self.optim = optim
        self.plan = plan
        self.monitor = monitor
        self.ema = ema
        self.tracker = tracker
        self.figures = figures
        self.callbacks = callbacks
        self.stop = stop
        self.skipped = SkippedSteps(list(root.terms), self.world, tracker, max_bad_steps)
        self.losses = RunningLosses(root.term_weights, self.world, self.skipped)
        self.metrics = metrics
        self.saving = Saving(
            engine=engine,
            statistics=self.statistics,
            ema=ema,
            losses=self.losses,
            metrics=metrics,
            monitor=monitor,
            plan=plan,
            writer=writer,
            recipe_text=recipe_text,
            data_text=data_text,
            record=tracker.lines,
        )
        self.progress = Progress()
        self._table = EpochTable(root.tasks, tracker.lines)
        self._evaluate = evaluate
        self._buffers = KeptBuffers(root)

    def load(self, checkpoint: Checkpoint, restart_best: bool = False) -> None:
        """Collective: go on from `checkpoint`, which every rank has read.

        With `restart_best` the next evaluation is the best one so far: those before cannot be compared.
        """
        self.progress = self.saving.load(checkpoint)
        if restart_best:
            self.progress.best = None
            self.monitor.restart()

    @property
    def epoch(self) -> float:
        """The epochs that are behind, the present one in part."""
        return self.progress.position / self.plan.samples_per_epoch

    # ------------------------------------------------------------------ the loop
    def run(self, batches: Iterable[Batch], advance: Callable[[int], None] = lambda samples: None) -> Outcome:
        """Train on this rank's micro-batches, which start at the position that it stands at."""
        at, plan = self.progress, self.plan
        if at.unfinished_epoch is not None:
            reason = self._finish_epoch(at.unfinished_epoch)
            if reason:
                return Outcome("stopped", at.step, reason)
        if self.monitor.exhausted:
            return self._stopped_early()
        self.root.train()
        clock = StepClock()
        for window in windows(device_prefetch(batches, self.world.device), plan.accumulation):
            clock.waited()
            beat("meeting the other ranks", at.step + 1)
            on_host, inputs = [host for host, _ in window], [batch for _, batch in window]
            totals, stopping = self._agree(on_host)
            if stopping:
                self.saving.save(at)
                return Outcome("stopped", at.step, stopping)

            torch.manual_seed(rank_seed(plan.seed, at.step, self.world.rank))
            epoch = at.position // plan.samples_per_epoch
            self._set_learning_rate(epoch)
            sums_T = torch.zeros_like(totals.counts_T, device=self.world.device, dtype=torch.float32)
            self._buffers.keep()
            weights = self.balancing.solve(inputs, totals)
            self.statistics.begin()
            seen: list[Seen] = []
            for number, batch in enumerate(inputs, start=1):
                beat("the forward")
                last = number == len(inputs)
                batch_sums_T, outputs = self.engine.forward_backward(batch, totals, weights, last=last)
                sums_T += batch_sums_T
                if self.metrics is not None:
                    seen.append(self.metrics.seen(batch, outputs))
            beat("the update")
            result = self.engine.step(self.root.absent_parameters(totals), self.optim.clip_norm)
            self.statistics.finish(len(inputs))

            at.step += 1
            at.position = min(at.position + plan.global_batch, plan.end_position)
            if self.ema is not None:
                self.ema.update(at.step, result.finite)
            self.balancing.observe(sums_T, totals)
            self._buffers.restore_unless(result.finite)
            count = None if self.metrics is None else partial(self.metrics.take, seen)
            self.losses.take(at.step, self.epoch, on_host, totals, sums_T, result, count)
            self._diagnose(totals)
            advance(plan.global_batch)
            clock.worked()
            if at.step % plan.log_every == 0:
                self._log_step(sums_T, totals, result.grad_norm, clock)
            crossed = at.position // plan.samples_per_epoch > epoch
            if crossed:
                self.root.balancer.end_epoch()
            if crossed or at.position == plan.end_position:
                reason = self._finish_epoch(epoch)
                if reason:
                    return Outcome("stopped", at.step, reason)
                if self.monitor.exhausted:
                    return self._stopped_early()
            if plan.checkpoint_every and at.step % plan.checkpoint_every == 0:
                self.saving.save(at)
            clock.skip()
        self.saving.save(at)
        return Outcome("done", at.step)

    def _stopped_early(self) -> Outcome:
        return Outcome("done", self.progress.step, f"{self.monitor.metric} stopped improving")

    # ------------------------------------------------------------------ parts of a step
    def _agree(self, window: Sequence[Batch]) -> tuple[WindowTotals, str]:
        """The label counts of the whole window, and the reason to stop if any rank has one."""
        counts_T = count_labels(self.root.tasks, window, self.root.joints)
        wish = torch.tensor([float(self.stop.requested)], dtype=torch.float64)
        agreed = self.world.sum(torch.cat([counts_T, wish]))
        totals = WindowTotals(counts_T=agreed[:-1], num_micro_batches=len(window), step=self.progress.step)
        if agreed[-1] == 0:
            return totals, ""
        reasons = self.world.gather(self.stop.reason)
        return totals, next(reason for reason in reasons if reason)

    def _set_learning_rate(self, epoch: int) -> None:
        plateau_factor = self.monitor.state.plateau_factor
        factor = learning_rate_factor(
            self.optim, self.progress.step, self.plan.total_steps, epoch, plateau_factor
        )
        set_learning_rate(self.engine.optimizer, factor)

    def _log_step(
        self, sums_T: torch.Tensor, totals: WindowTotals, grad_norm: torch.Tensor, clock: StepClock
    ) -> None:
        self.losses.settle()
        metrics = self.losses.of_step(sums_T, totals)
        metrics |= {f"lr/{part}": rate for part, rate in learning_rates(self.engine.optimizer).items()}
        if self.losses.has_losses:
            metrics["grad_norm"] = float(grad_norm)
        scaler = self.engine.scaler
        metrics["skipped_steps"] = float(self.skipped.num_skipped)
        if scaler is not None:
            metrics["loss_scale"] = scaler.scale
            metrics["skipped_steps"] += scaler.num_skipped
        metrics |= clock.metrics(self.plan.global_batch)
        self.tracker.record("step", self.progress.step, self.epoch, metrics)
        self.tracker.status(self.status("running", images_per_s=metrics["images_per_s"]))

    def _diagnose(self, totals: WindowTotals) -> None:
        """In the steps that compare the tasks' gradients: write down what was found, and say who fights."""
        found = self.balancing.diagnosis(totals)
        if found is None:
            return
        self.losses.settle()
        if not self.losses.has_losses:
            return
        balancer = self.root.balancer
        metrics = {f"balance/{name}": value for name, value in found.scalars().items()}
        weights = zip(self.root.terms, balancer.last_weights_T.tolist(), strict=True)
        metrics |= {f"balance/weight/{name}": weight for name, weight in weights}
        metrics["balance/num_unconverged"] = float(balancer.num_unconverged)
        self.tracker.record("balance", self.progress.step, self.epoch, metrics)
        for sentence in self.balancing.conflicts.look(found):
            self.tracker.say(f"step {self.progress.step}: {sentence}")

    # ------------------------------------------------------------------ the end of an epoch
    def _finish_epoch(self, before: int) -> str:
        """Evaluate if it is time to, write the epoch's row, remember the best, save.

        `before` is the epoch in which the step began: a large batch may finish several at once. Returns the
        reason to stop, if any rank was asked to during the evaluation: a resumed run begins with it.
        """
        at, epoch = self.progress, self.epoch
        ended = at.position == self.plan.end_position
        every = self.plan.evaluate_every
        due = ended or int(epoch) // every > before // every
        self.losses.settle()
        metrics = self.losses.of_epoch() | (self.metrics.of_epoch() if self.metrics is not None else {})
        is_best = False
        if self._evaluate is not None and due:
            swapped = self.ema.swapped_in() if self.ema is not None else nullcontext()
            try:
                with swapped, self.engine.evaluating():
                    evaluation = self._evaluate()
                    metrics |= evaluation.flat("val")
                    self._table.baselines |= evaluation.baselines
            except StopAsked as asked:
                at.unfinished_epoch = before
                self.saving.save(at)
                return asked.reason
        beat("the end of the epoch", slow=True)
        at.unfinished_epoch = None
        metrics |= self.monitor.of(metrics)
        if due and self._evaluate is not None:
            self.monitor.observe_tasks(at.step, metrics)
        if due and (self._evaluate is not None or self.monitor.metric in metrics):
            value = metrics.get(self.monitor.metric, math.nan)
            is_best = self.monitor.observe(value)
            if is_best:
                at.best = Best(at.step, self.monitor.metric, value)
        # A plan that ends within an epoch may be lengthened: then its row is to cover the whole epoch.
        if int(epoch) > before:
            self.losses.begin_epoch()
            if self.metrics is not None:
                self.metrics.begin_epoch()
        self.tracker.record("epoch", at.step, epoch, metrics)
        self.tracker.say("\n".join([self._epoch_line(metrics, is_best), *self._table.lines(metrics)]))
        self.figures.refresh()
        self.saving.save(at)
        if due and self._evaluate is not None:
            self.call("evaluation_end", metrics)
        if int(epoch) > before:
            self.call("epoch_end", metrics)
        return ""

    def call(self, moment: Moment, metrics: Mapping[str, float]) -> None:
        """Collective: the user's callbacks, at a moment of the run."""
        if self.callbacks is not None:
            self.callbacks(moment, self.progress.step, self.plan.total_steps, self.epoch, metrics)

    def _epoch_line(self, metrics: Mapping[str, float], is_best: bool) -> str:
        at = self.progress
        parts = [f"epoch {self.plan.epoch_words(at.position)}", f"step {at.step}/{self.plan.total_steps}"]
        shown = dict.fromkeys(["train/loss", "val/loss", self.monitor.metric])
        parts += [f"{name} {readable(metrics[name])}" for name in shown if name in metrics]
        return "  ".join(parts) + ("  best" if is_best else "")

    def status(self, state: State, reason: str = "", images_per_s: float = 0.0) -> Status:
        """Where the run stands now."""
        return Status(
            state=state,
            step=self.progress.step,
            total_steps=self.plan.total_steps,
            epoch=self.epoch,
            position=self.progress.position,
            end_position=self.plan.end_position,
            images_per_s=images_per_s,
            metric=self.monitor.metric,
            best=self.monitor.state.best,
            saved=self.saving.newest,
            reason=reason,
        )
