"""Steps that are not finite: skipped whole by all ranks, counted, and their samples named.

One NaN pixel or one infinite loss makes every gradient NaN, on all ranks once they have averaged it. Such a
step changes nothing: the engine passes its optimizer by, the root module's buffers (BatchNorm's statistics,
what a method of balancing remembers) are put back, averages and sums leave it out.

On a GPU it is known there whether a step was finite, and what must stay as it was is selected there. The host
reads the verdict one step late, so that it never waits for the step it has just enqueued; on a CPU at once.
All ranks have the same verdicts, and read them in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.batch import Batch
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.step import WindowTotals
from mtl_dist.tracking.sink import SkippedStep
from mtl_dist.tracking.tracker import Tracker

AMONG = 100
"""The steps in a row of which at most `max_bad_steps` may be skipped."""
NUM_NAMED = 5
"""Keys on the line for people; the file has them all."""


class KeptBuffers:
    """The buffers of a module as they were before a window."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [part for part in module.modules() if part._buffers]
        self._sizes: list[torch.Size] = []
        self._kept: dict[torch.dtype, Tensor] = {}

    def keep(self) -> None:
        """Copy them; a tensor per dtype, as one copy is much quicker than many."""
        self._sizes = [buffer.shape for buffer in self._buffers()]
        self._kept = {dtype: _flat(buffers) for dtype, buffers in self._by_dtype().items()}

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """Put them back where the step was not finite. On a GPU the host does not wait for it."""
        same_sizes = [buffer.shape for buffer in self._buffers()] == self._sizes
        if finite.device.type == "cpu" or not same_sizes:
            if finite:
                return
            # What takes its size in its first window is without one again.
            for buffer, size in zip(self._buffers(), self._sizes, strict=True):
                buffer.resize_(size)
        for dtype, buffers in self._by_dtype().items():
            kept = self._kept[dtype]
            chosen = torch.where(finite, _flat(buffers), kept) if finite.device == kept.device else kept
            parts = chosen.split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view(buffer.shape))

    def _buffers(self) -> list[Tensor]:
        return [b for module in self._modules for b in module._buffers.values() if b is not None]

    def _by_dtype(self) -> dict[torch.dtype, list[Tensor]]:
        found: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._buffers():
            found.setdefault(buffer.dtype, []).append(buffer)
        return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class Verdict:
    """Whether a step was finite, on its way from the device to the host."""

    def __init__(self, finite: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = finite
        if finite.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(finite, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


@dataclass(frozen=True)
class TakenStep:
    """A step whose verdict the host has not read: its number, this rank's window and what came out of it.

    `overflowed` says that fp16's loss scale was too large, which the scaler answers: nothing is wrong with
    the samples. `count` takes the step into the training metrics.
    """

    step: int
    epoch: float
    window: Sequence[Batch]
    totals: WindowTotals
    sums_T: Tensor
    finite: Verdict
    overflowed: bool = False
    count: Callable[[], None] | None = None


@dataclass
class SkippedSteps:
    """Which steps were skipped since the run began, and how many may be.

    `num_skipped` counts them all, `recent` holds the last ones; both are part of a checkpoint.
    """

    tasks: Sequence[str]
    world: World
    tracker: Tracker
    most: int
    num_skipped: int = 0
    recent: deque[int] = field(default_factory=deque)

    def add(self, taken: TakenStep) -> None:
        """Collective: count a skipped step, say whose loss it was and which samples it had, and keep them.

        Raises:
            UserError: there were too many of late.
        """
        self.num_skipped += 1
        self.recent.append(taken.step)
        while self.recent[0] <= taken.step - AMONG:
            self.recent.popleft()
        found = self._found(taken)
        self.tracker.skipped(found)
        self.tracker.say(_line(found))
        if len(self.recent) > self.most:
            raise UserError(
                f"train.max_bad_steps: expected at most {self.most} of {AMONG} steps with a loss or gradient "
                f"that is not finite, found {len(self.recent)}, the last one at step {taken.step}. Lower "
                "optim.lr, set optim.clip_norm, or look at the samples in skipped_steps.jsonl; the last "
                "checkpoint is whole."
            )

    def _found(self, taken: TakenStep) -> SkippedStep:
        keys = [key for batch in taken.window for key in batch.keys]
        images = [key for batch in taken.window for key in _not_finite_images(batch)]
        bad = [
            name
            for name, finite in zip(self.tasks, taken.sums_T.isfinite().tolist(), strict=True)
            if not finite
        ]
        # Of all ranks, and each name once.
        all_keys, all_images, all_tasks = (
            tuple(dict.fromkeys(name for names in self.world.gather(own) for name in names))
            for own in (keys, images, bad)
        )
        return SkippedStep(taken.step, taken.epoch, all_tasks, all_images, all_keys)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"num_skipped": self.num_skipped, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.num_skipped = state["num_skipped"]
        self.recent = deque(state["recent"])


def _not_finite_images(batch: Batch) -> list[str]:
    images = batch.images_BCHW
    if not images.is_floating_point():
        return []
    finite_B = images.flatten(1).isfinite().all(1)
    return [key for key, finite in zip(batch.keys, finite_B.tolist(), strict=True) if not finite]


def _line(found: SkippedStep) -> str:
    what = f"the loss of {', '.join(found.tasks)}" if found.tasks else "the gradient"
    whose, keys = (
        ("images with NaN or infinity", found.images) if found.images else ("its samples", found.keys)
    )
    named = ", ".join(keys[:NUM_NAMED]) + (", ..." if len(keys) > NUM_NAMED else "")
    return (
        f"step {found.step} was skipped: {what} is not finite; {whose}: {named} (skipped_steps.jsonl has all)"
    )
