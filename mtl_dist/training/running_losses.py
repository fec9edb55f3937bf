"""The training losses: what each step adds to them, and their means over a step and over an epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mtl_dist.batch import Batch
from mtl_dist.engine.engine import StepResult
from mtl_dist.engine.world import World
from mtl_dist.skipping import SkippedSteps, TakenStep, Verdict
from mtl_dist.step import WindowTotals


class RunningLosses:
    """The tasks' loss sums and label counts of the epoch so far, without the steps that were skipped.

    On a GPU the host learns one step late whether a step was finite: until then the step waits here. All
    ranks call alike.
    """

    def __init__(self, term_weights: Mapping[str, float], world: World, skipped: SkippedSteps) -> None:
        self.skipped = skipped
        self.has_losses = True
        """Whether the losses of the last step whose verdict was read are finite."""
        self._term_weights = term_weights
        self._world = world
        num_tasks = len(term_weights)
        # On the device, so that adding to it never makes the host wait; this rank's part.
        self._sums_T = torch.zeros(num_tasks, dtype=torch.float64, device=world.device)
        # On the host; already summed over the ranks.
        self._counts_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._taken: deque[TakenStep] = deque()
        self._lag = 1 if world.device.type == "cuda" else 0
        """Steps whose verdict may be still on its way."""

    def take(
        self,
        step: int,
        epoch: float,
        window: Sequence[Batch],
        totals: WindowTotals,
        sums_T: Tensor,
        result: StepResult,
        count: Callable[[], None] | None,
    ) -> None:
        """Collective: a step that is over, once it is known to be finite; then the metrics count it."""
        verdict = Verdict(result.finite)
        self._taken.append(TakenStep(step, epoch, window, totals, sums_T, verdict, result.overflowed, count))
        self.settle(self._lag)

    def settle(self, lag: int = 0) -> None:
        """Collective: take in the sums of all but the last `lag` steps; name those that were skipped."""
        while len(self._taken) > lag:
            taken = self._taken.popleft()
            # Where only fp16's scale was too large, the losses are as good as any.
            self.has_losses = bool(taken.finite) or taken.overflowed
            if self.has_losses:
                self._sums_T += taken.sums_T
                self._counts_T += taken.totals.counts_T
                if taken.count is not None:
                    taken.count()
            else:
                self.skipped.add(taken)

    def of_step(self, sums_T: Tensor, totals: WindowTotals) -> dict[str, float]:
        """Collective: `step/loss` and `step/TASK/loss` of a global batch; nothing where it was skipped."""
        return self._means("step", sums_T, totals.counts_T) if self.has_losses else {}

    def of_epoch(self) -> dict[str, float]:
        """Collective: `train/loss` and `train/TASK/loss` of the epoch so far."""
        return self._means("train", self._sums_T, self._counts_T)

    def begin_epoch(self) -> None:
        """Forget the epoch that is over."""
        self._sums_T.zero_()
        self._counts_T.zero_()

    def _means(
        self, over: Literal["step", "train"], local_sums_T: Tensor, counts_T: Tensor
    ) -> dict[str, float]:
        """The total and each task's mean; a task without labels has none."""
        sums_T = self._world.sum(local_sums_T.double().cpu())
        losses = {
            name: float(sums_T[t] / counts_T[t])
            for t, name in enumerate(self._term_weights)
            if counts_T[t] > 0
        }
        if not losses:
            return {}
        total = sum(self._term_weights[name] * loss for name, loss in losses.items())
        return {f"{over}/loss": total, **{f"{over}/{name}/loss": loss for name, loss in losses.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Collective: plain numbers over all ranks, for a checkpoint. Settle first."""
        sums_T = self._world.sum(self._sums_T.cpu())
        return {
            "epoch_sums": sums_T.tolist(),
            "epoch_counts": self._counts_T.tolist(),
            "skipped": self.skipped.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.skipped.load_state_dict(state["skipped"])
        # The sums are a total over all ranks: rank 0 carries it on.
        if self._world.is_main:
            self._sums_T.copy_(torch.tensor(state["epoch_sums"], dtype=torch.float64))
        self._counts_T.copy_(torch.tensor(state["epoch_counts"], dtype=torch.float64))
