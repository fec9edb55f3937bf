"""Where a training stands, and its whole state in a checkpoint: written in the background, taken up again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtl_dist.batch_statistics import BatchStatistics
from mtl_dist.checkpoint import Best, Checkpoint, CheckpointWriter
from mtl_dist.ema import Ema
from mtl_dist.engine.engine import Engine
from mtl_dist.heartbeat import beat
from mtl_dist.monitor import Monitor
from mtl_dist.training.plan import Plan
from mtl_dist.training.running_losses import RunningLosses
from mtl_dist.training.running_metrics import RunningMetrics


@dataclass
class Progress:
    """Where a training stands: completed steps and consumed samples, and the best evaluation so far."""

    step: int = 0
    position: int = 0
    best: Best | None = None
    unfinished_epoch: int | None = None
    """The epoch whose evaluation was broken off."""


class Saving:
    """Saves the parts of a training, and loads them; every rank calls it alike.

    `writer` is rank 0's, `record` the lines of metrics.jsonl, which grow.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        statistics: BatchStatistics,
        ema: Ema | None,
        losses: RunningLosses,
        metrics: RunningMetrics | None,
        monitor: Monitor,
        plan: Plan,
        writer: CheckpointWriter | None,
        recipe_text: str,
        data_text: str,
        record: Sequence[str],
    ) -> None:
        self._engine = engine
        self._statistics = statistics
        self._ema = ema
        self._losses = losses
        self._metrics = metrics
        self._monitor = monitor
        self._plan = plan
        self._writer = writer
        self._recipe_text = recipe_text
        self._data_text = data_text
        self._record = record
        self._saved_step = -1

    def save(self, progress: Progress) -> None:
        """Collective: take a host copy of the whole state, once a step; rank 0 writes it meanwhile."""
        if self._saved_step == progress.step:
            return
        beat("saving", progress.step, slow=True)
        self._losses.settle()
        full = self._engine.full_state()
        average = self._ema.full() if self._ema is not None else {}
        losses = self._losses.state_dict()
        counted = self._metrics.tensors() if self._metrics is not None else {}
        self._saved_step = progress.step
        if self._writer is None:
            return
        tensors = {"model": full.model, "optimizer": full.optimizer}
        if average:
            tensors["ema"] = average
        if counted:
            tensors["metrics"] = counted
        state = {
            "step": progress.step,
            "position": progress.position,
            "global_batch": self._plan.global_batch,
            "samples_per_epoch": self._plan.samples_per_epoch,
            "world_size": self._engine.world.size,
            "monitor": self._monitor.state_dict(),
            "scaler": full.scaler,
            "unfinished_epoch": progress.unfinished_epoch,
            **losses,
        }
        texts = self._recipe_text, self._data_text, "".join(self._record)
        self._writer.submit(Checkpoint(progress.step, tensors, state, *texts), progress.best)

    def load(self, checkpoint: Checkpoint) -> Progress:
        """Collective: take over `checkpoint`, which every rank has read; where it stands."""
        state, tensors = checkpoint.state, checkpoint.tensors
        self._engine.load_full_state(tensors["model"], tensors["optimizer"], state["scaler"])
        self._statistics.reload()
        if self._ema is not None:
            self._ema.load(tensors["ema"])
        self._monitor.load_state_dict(state["monitor"])
        self._losses.load_state_dict(state)
        if self._metrics is not None:
            self._metrics.load(tensors.get("metrics", {}), state["world_size"])
        if self._writer is not None:
            self._writer.newest = checkpoint.step
        unfinished_epoch = state.get("unfinished_epoch")
        # Where an evaluation was broken off, the one to come may make this step the best: saved again.
        self._saved_step = state["step"] if unfinished_epoch is None else -1
        best = Best(**state["best"]) if state["best"] is not None else None
        return Progress(state["step"], state["position"], best, unfinished_epoch)

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint that rank 0 has written; 0 before there is one."""
        return self._writer.newest if self._writer is not None else 0

    def finish(self) -> None:
        """Wait until everything is written."""
        if self._writer is not None:
            self._writer.finish()
