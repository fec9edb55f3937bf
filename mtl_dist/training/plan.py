"""How far a training goes, what it does on the way, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from mtl_dist.data.partition import micro_batch_size

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

    def epoch_words(self, position: int) -> str:
        """How many epochs are done of how many, as in `2/15`: whole where they are, though the step that ends
        one reaches into the next."""
        whole, rest = divmod(position, self.samples_per_epoch)
        ends_within = position == self.end_position and rest > 0
        done = f"{position / self.samples_per_epoch:.2f}" if ends_within else f"{whole}"
        planned = self.end_position / self.samples_per_epoch
        return f"{done}/{planned:.0f}" if planned == int(planned) else f"{done}/{planned:.2f}"

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


def windows(batches: Iterable[T], accumulation: int) -> Iterator[list[T]]:
    """This rank's micro-batches, `accumulation` at a time: one list per optimizer step."""
    window: list[T] = []
    for batch in batches:
        window.append(batch)
        if len(window) == accumulation:
            yield window
            window = []
