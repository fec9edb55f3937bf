"""The training loop. It receives built parts, never the recipe."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.batch_statistics import BatchStatistics
from mtl_dist.checkpoint import Best, Checkpoint, CheckpointWriter
from mtl_dist.data.device_prefetch import device_prefetch
from mtl_dist.data.partition import micro_batch_size
from mtl_dist.ema import Ema
from mtl_dist.engine.engine import Engine, StepResult
from mtl_dist.evaluator import Evaluation
from mtl_dist.figures.run_figures import RunFigures
from mtl_dist.monitor import Monitor
from mtl_dist.optim import OptimSettings, learning_rate_factor, learning_rates, set_learning_rate
from mtl_dist.randomness import rank_seed
from mtl_dist.skipping import KeptBuffers, SkippedSteps, TakenStep, Verdict
from mtl_dist.status import State, Status
from mtl_dist.step import RootModule, WindowTotals, count_labels
from mtl_dist.stopping import StopAsked, StopSignal
from mtl_dist.tracking.tracker import Tracker

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How far a run goes, and what it does on the way.

    Positions count samples of the training stream; epoch e is positions [e * samples_per_epoch,
    (e + 1) * samples_per_epoch). `checkpoint_every` and `log_every` are in steps, `evaluate_every` in epochs.
    """

    samples_per_epoch: int
    end_position: int
    global_batch: int
    accumulation: int
    seed: int
    evaluate_every: int
    checkpoint_every: int | None
    log_every: int

    @property
    def total_steps(self) -> int:
        return -(-self.end_position // self.global_batch)

    def micro_batch_on(self, num_ranks: int) -> int:
        """The samples of one forward on one of `num_ranks` ranks."""
        return micro_batch_size(self.global_batch, num_ranks, self.accumulation)


@dataclass(frozen=True)
class Outcome:
    """How training ended: at the plan's end or where patience ran out ("done"), or asked to stop."""

    state: Literal["done", "stopped"]
    step: int
    reason: str = ""
    directory: Path | None = None
    """The run folder, once it is complete."""


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
        max_bad_steps: int,
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
        self.writer = writer
        self.tracker = tracker
        self.figures = figures
        self.stop = stop
        self.recipe_text = recipe_text
        self._evaluate = evaluate
        self.step = 0
        self.position = 0
        num_tasks = len(root.tasks)
        # On the device, so that adding to it never makes the host wait; this rank's part.
        self._epoch_sums_T = torch.zeros(num_tasks, dtype=torch.float64, device=self.world.device)
        # On the host; already summed over the ranks.
        self._epoch_counts_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._buffers = KeptBuffers(root)
        self._taken: deque[TakenStep] = deque()
        self._lag = 1 if self.world.device.type == "cuda" else 0
        """Steps whose verdict may be still on its way."""
        self._has_losses = True
        """Whether the losses of the last step whose verdict was read are finite."""
        self.skipped = SkippedSteps(list(root.tasks), self.world, tracker, max_bad_steps)
        self.best: Best | None = None
        self._saved_step = -1
        self._unfinished_epoch: int | None = None
        """The epoch whose evaluation was broken off."""

    # ------------------------------------------------------------------ the loop
    def run(self, batches: Iterable[Batch], advance: Callable[[int], None] = lambda samples: None) -> Outcome:
        """Train on this rank's micro-batches, which start at `self.position`."""
        if self._unfinished_epoch is not None:
            reason = self._finish_epoch(self._unfinished_epoch)
            if reason:
                return Outcome("stopped", self.step, reason)
        if self.monitor.exhausted:
            return self._stopped_early()
        self.root.train()
        clock = _Clock()
        for window in windows(device_prefetch(batches, self.world.device), self.plan.accumulation):
            clock.waited()
            totals, stopping = self._agree([on_host for on_host, _ in window])
            if stopping:
                self._save()
                return Outcome("stopped", self.step, stopping)

            torch.manual_seed(rank_seed(self.plan.seed, self.step, self.world.rank))
            epoch = self.position // self.plan.samples_per_epoch
            factor = learning_rate_factor(
                self.optim, self.step, self.plan.total_steps, epoch, self.monitor.state.plateau_factor
            )
            set_learning_rate(self.engine.optimizer, factor)
            sums_T = torch.zeros_like(totals.counts_T, device=self.world.device, dtype=torch.float32)
            inputs = [on_device for _, on_device in window]
            self._buffers.keep()
            weights = self.balancing.solve(inputs, totals)
            self.statistics.begin()
            for number, batch in enumerate(inputs, start=1):
                sums_T += self.engine.forward_backward(batch, totals, weights, last=number == len(inputs))
            logs = (self.step + 1) % self.plan.log_every == 0
            result = self.engine.step(self.root.absent_parameters(totals), self.optim.clip_norm)
            self.statistics.finish(len(inputs))

            self.step += 1
            self.position = min(self.position + self.plan.global_batch, self.plan.end_position)
            if self.ema is not None:
                self.ema.update(self.step, result.finite)
            self.balancing.observe(sums_T, totals)
            self._buffers.restore_unless(result.finite)
            self._take([on_host for on_host, _ in window], totals, sums_T, result)
            self._diagnose(totals)
            advance(self.plan.global_batch)
            clock.worked()
            if logs:
                self._log_step(sums_T, totals, result.grad_norm, clock)
            crossed = self.position // self.plan.samples_per_epoch > epoch
            if crossed:
                self.root.balancer.end_epoch()
            if crossed or self.position == self.plan.end_position:
                reason = self._finish_epoch(epoch)
                if reason:
                    return Outcome("stopped", self.step, reason)
                if self.monitor.exhausted:
                    return self._stopped_early()
            if self.plan.checkpoint_every and self.step % self.plan.checkpoint_every == 0:
                self._save()
            clock.skip()
        self._save()
        return Outcome("done", self.step)

    def _stopped_early(self) -> Outcome:
        return Outcome("done", self.step, f"{self.monitor.metric} stopped improving")

    # ------------------------------------------------------------------ its parts
    def _agree(self, window: list[Batch]) -> tuple[WindowTotals, str]:
        """The label counts of the whole window, and the reason to stop if any rank has one."""
        counts_T = count_labels(self.root.tasks, window)
        wish = torch.tensor([float(self.stop.requested)], dtype=torch.float64)
        agreed = self.world.sum(torch.cat([counts_T, wish]))
        totals = WindowTotals(counts_T=agreed[:-1], num_micro_batches=len(window), step=self.step)
        if agreed[-1] == 0:
            return totals, ""
        reasons = self.world.gather(self.stop.reason)
        return totals, next(reason for reason in reasons if reason)

    def _take(
        self, window: list[Batch], totals: WindowTotals, sums_T: torch.Tensor, result: StepResult
    ) -> None:
        """A step that is over, once it is known to be finite: on a GPU that is known one step later."""
        epoch = self.position / self.plan.samples_per_epoch
        verdict = Verdict(result.finite)
        self._taken.append(TakenStep(self.step, epoch, window, totals, sums_T, verdict, result.overflowed))
        self._settle(self._lag)

    def _settle(self, lag: int = 0) -> None:
        """Collective: take in the sums of all but the last `lag` steps; name those that were skipped."""
        while len(self._taken) > lag:
            taken = self._taken.popleft()
            # Where only fp16's scale was too large, the losses are as good as any.
            self._has_losses = bool(taken.finite) or taken.overflowed
            if self._has_losses:
                self._epoch_sums_T += taken.sums_T
                self._epoch_counts_T += taken.totals.counts_T
            else:
                self.skipped.add(taken)

    def _mean_losses(
        self, over: Literal["step", "train"], local_sums_T: torch.Tensor, counts_T: torch.Tensor
    ) -> dict[str, float]:
        """Collective: the total and per-task training loss, as in `step/loss` of one global batch or
        `train/loss` of an epoch; a task without labels has none.
        """
        sums_T = self.world.sum(local_sums_T.double().cpu())
        losses = {
            name: float(sums_T[t] / counts_T[t]) for t, name in enumerate(self.root.tasks) if counts_T[t] > 0
        }
        if not losses:
            return {}
        total = sum(self.root.task_weights[name] * loss for name, loss in losses.items())
        return {f"{over}/loss": total, **{f"{over}/{name}/loss": loss for name, loss in losses.items()}}

    def _log_step(
        self, sums_T: torch.Tensor, totals: WindowTotals, grad_norm: torch.Tensor, clock: _Clock
    ) -> None:
        self._settle()
        figures = self._mean_losses("step", sums_T, totals.counts_T) if self._has_losses else {}
        figures |= {f"lr/{part}": rate for part, rate in learning_rates(self.engine.optimizer).items()}
        if self._has_losses:
            figures["grad_norm"] = float(grad_norm)
        scaler = self.engine.scaler
        figures["skipped_steps"] = float(self.skipped.num_skipped)
        if scaler is not None:
            figures["loss_scale"] = scaler.scale
            figures["skipped_steps"] += scaler.num_skipped
        figures |= clock.figures(self.plan.global_batch)
        self.tracker.record("step", self.step, self.position / self.plan.samples_per_epoch, figures)
        self.tracker.status(self.status("running", images_per_s=figures["images_per_s"]))

    def _diagnose(self, totals: WindowTotals) -> None:
        """In the steps that compare the tasks' gradients: write down what was found, and say who fights."""
        found = self.balancing.diagnosis(totals)
        if found is None:
            return
        self._settle()
        if not self._has_losses:
            return
        balancer = self.root.balancer
        figures = {f"balance/{name}": value for name, value in found.scalars().items()}
        weights = zip(self.root.tasks, balancer.last_weights_T.tolist(), strict=True)
        figures |= {f"balance/weight/{name}": weight for name, weight in weights}
        figures["balance/num_unconverged"] = float(balancer.num_unconverged)
        self.tracker.record("balance", self.step, self.position / self.plan.samples_per_epoch, figures)
        for sentence in self.balancing.conflicts.look(found):
            self.tracker.say(f"step {self.step}: {sentence}")

    def _finish_epoch(self, before: int) -> str:
        """Evaluate if it is time to, write the epoch's row, remember the best, save.

        `before` is the epoch in which the step began: a large batch may finish several at once. Returns the
        reason to stop, if any rank was asked to during the evaluation: a resumed run begins with it.
        """
        epoch = self.position / self.plan.samples_per_epoch
        ended = self.position == self.plan.end_position
        every = self.plan.evaluate_every
        due = ended or int(epoch) // every > before // every
        self._settle()
        figures = self._mean_losses("train", self._epoch_sums_T, self._epoch_counts_T)
        is_best = False
        if self._evaluate is not None and due:
            swapped = self.ema.swapped_in() if self.ema is not None else nullcontext()
            try:
                with swapped, self.engine.evaluating():
                    figures |= self._evaluate().flat("val")
            except StopAsked as asked:
                self._unfinished_epoch = before
                self._save()
                return asked.reason
            value = figures.get(self.monitor.metric, math.nan)
            is_best = self.monitor.observe(value)
            if is_best:
                self.best = Best(self.step, self.monitor.metric, value)
        self._unfinished_epoch = None
        # A plan that ends within an epoch may be lengthened: then its row is to cover the whole epoch.
        if int(epoch) > before:
            self._epoch_sums_T.zero_()
            self._epoch_counts_T.zero_()
        self.tracker.record("epoch", self.step, epoch, figures)
        self.tracker.say(self._epoch_line(epoch, figures, is_best))
        self.figures.refresh()
        self._save()
        return ""

    def _epoch_line(self, epoch: float, figures: Mapping[str, float], is_best: bool) -> str:
        parts = [f"epoch {epoch:g}", f"step {self.step}/{self.plan.total_steps}"]
        shown = dict.fromkeys(["train/loss", "val/loss", self.monitor.metric])
        parts += [f"{name} {figures[name]:.4f}" for name in shown if name in figures]
        return "  ".join(parts) + ("  best" if is_best else "")

    def status(self, state: State, reason: str = "", images_per_s: float = 0.0) -> Status:
        """Where the run stands now."""
        return Status(
            state=state,
            step=self.step,
            total_steps=self.plan.total_steps,
            epoch=self.position / self.plan.samples_per_epoch,
            position=self.position,
            end_position=self.plan.end_position,
            images_per_s=images_per_s,
            metric=self.monitor.metric,
            best=self.monitor.state.best,
            reason=reason,
        )

    # ------------------------------------------------------------------ state
    def _save(self) -> None:
        """Collective: take a host copy of the whole state; rank 0 writes it in the background."""
        if self._saved_step == self.step:
            return
        self._settle()
        full = self.engine.full_state()
        average = self.ema.full() if self.ema is not None else {}
        sums_T = self.world.sum(self._epoch_sums_T.cpu())
        self._saved_step = self.step
        if self.writer is None:
            return
        tensors = {"model": full.model, "optimizer": full.optimizer}
        if average:
            tensors["ema"] = average
        state = {
            "step": self.step,
            "position": self.position,
            "global_batch": self.plan.global_batch,
            "samples_per_epoch": self.plan.samples_per_epoch,
            "world_size": self.world.size,
            "monitor": self.monitor.state_dict(),
            "scaler": full.scaler,
            "unfinished_epoch": self._unfinished_epoch,
            "epoch_sums": sums_T.tolist(),
            "epoch_counts": self._epoch_counts_T.tolist(),
            "skipped": self.skipped.state_dict(),
        }
        self.writer.submit(Checkpoint(self.step, tensors, state, self.recipe_text), self.best)

    def load(self, checkpoint: Checkpoint) -> None:
        """Collective: go on from `checkpoint`, which every rank has read."""
        state, tensors = checkpoint.state, checkpoint.tensors
        self.engine.load_full_state(tensors["model"], tensors["optimizer"], state["scaler"])
        self.statistics.reload()
        if self.ema is not None:
            self.ema.load(tensors["ema"])
        self.step = self._saved_step = state["step"]
        self._unfinished_epoch = state.get("unfinished_epoch")
        if self._unfinished_epoch is not None:
            self._saved_step = -1  # the evaluation to come may make it the best
        self.position = state["position"]
        self.skipped.load_state_dict(state["skipped"])
        self.best = Best(**state["best"]) if state["best"] is not None else None
        self.monitor.load_state_dict(state["monitor"])
        # The sums are a total over all ranks: rank 0 carries it on.
        if self.world.is_main:
            self._epoch_sums_T.copy_(torch.tensor(state["epoch_sums"], dtype=torch.float64))
        self._epoch_counts_T.copy_(torch.tensor(state["epoch_counts"], dtype=torch.float64))


class _Clock:
    """Where the time went since the last logged step; evaluations and saves do not count."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._waited = self._worked = 0.0
        self._steps = 0

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        return lap

    def waited(self) -> None:
        """The time since the last call was spent waiting for data."""
        self._waited += self._lap()

    def worked(self) -> None:
        """The time since the last call was spent on an optimizer step."""
        self._worked += self._lap()
        self._steps += 1

    def skip(self) -> None:
        """The time since the last call does not count."""
        self._lap()

    def figures(self, global_batch: int) -> dict[str, float]:
        """Images per second over all ranks, and the share of the time spent waiting for data."""
        seconds = max(self._waited + self._worked, 1e-9)
        figures = {"images_per_s": self._steps * global_batch / seconds, "data_wait": self._waited / seconds}
        self._waited = self._worked = 0.0
        self._steps = 0
        return figures


def windows(batches: Iterable[T], accumulation: int) -> Iterator[list[T]]:
    """This rank's micro-batches, `accumulation` at a time: one list per optimizer step."""
    window: list[T] = []
    for batch in batches:
        window.append(batch)
        if len(window) == accumulation:
            yield window
            window = []
