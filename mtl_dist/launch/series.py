"""Several trainings on this machine, each in processes of its own: `mtl sweep` and `mtl compare`.

    DIR/<name>.yaml     the recipe of one training
    DIR/<name>/         its run folder, as `mtl train` leaves it
    DIR/<name>.txt      what it said

What is done is not trained again, and what was interrupted goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from mtl_dist.config.loading import to_yaml
from mtl_dist.config.trust import parts_of
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.launch.gpus import visible_gpus
from mtl_dist.launch.local import Launch, plan_launch, supervise_all
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.status import read_status

T = TypeVar("T", bound="Training")

USER_ERROR = 2


@dataclass(frozen=True, eq=False)
class Training:
    """One training of a series: where it is, and what came of it."""

    directory: Path

    @property
    def recipe_path(self) -> Path:
        return self.directory.parent / f"{self.directory.name}.yaml"

    @property
    def output_path(self) -> Path:
        return self.directory.parent / f"{self.directory.name}.txt"

    @property
    def is_done(self) -> bool:
        status = read_status(self.directory)
        return status is not None and status.state == "done"

    @property
    def failure(self) -> str:
        """Why it has no result: its loss was not finite, for example."""
        status = read_status(self.directory)
        return status.reason if status is not None and status.state == "failed" else ""

    def write_recipe(self, recipe: Recipe, advice: str) -> None:
        """Write down the recipe; refuse one other than that of the first start, with `advice`.

        Raises:
            UserError: naming the first section that differs.
        """
        if not self.recipe_path.is_file():
            self.recipe_path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe_path, to_yaml(recipe))
            return
        with parts_of(self.recipe_path.parent, self.recipe_path.name):
            before = load_recipe(self.recipe_path)
        for section in type(before).model_fields:
            if getattr(before, section) != getattr(recipe, section):
                raise UserError(
                    f"{section}: expected the same as in {self.recipe_path}, found another value. {advice}"
                )

    def last_words(self, code: int) -> str:
        """The last line that it said before it ended with `code`."""
        said = self.output_path.read_text(encoding="utf-8", errors="replace").split("\n")
        lines = [line for line in said if line.strip()]
        last = lines[-1] if lines else "it said nothing"
        return last if code == USER_ERROR else f"{last} (exit code {code}; see {self.output_path})"


def train_all(
    trainings: Sequence[T],
    nproc: int | None,
    parallel: int,
    started: Callable[[T], None],
    ended: Callable[[T, int], None],
    tags: Sequence[str] = (),
) -> int:
    """Train those that are not done, `parallel` at a time; 0, or 128 + n after signal n: all have saved.

    Each has `nproc` processes; without it one per GPU of its part of the machine, or one.

    Raises:
        UserError: fewer GPUs than processes of one training; or what `ended` raises, when none is running.
    """
    todo = [training for training in trainings if not training.is_done]

    def start(number: int, slot: int) -> tuple[Launch, IO[bytes]]:
        training = todo[number]
        launch = launch_of(training, nproc, parallel, slot, tags)
        started(training)
        return launch, open(training.output_path, "ab")

    return supervise_all(len(todo), parallel, start, lambda number, code: ended(todo[number], code))


def launch_of(training: Training, nproc: int | None, parallel: int, slot: int, tags: Sequence[str]) -> Launch:
    """How to start one training beside `parallel - 1` others, which share cores and GPUs."""
    arguments = ["train", str(training.recipe_path), "--run-dir", str(training.directory)]
    arguments += [f"--tag={tag}" for tag in tags]
    gpus = visible_gpus()
    each = nproc or max(1, len(gpus) // parallel)
    own = share_of(gpus, each, slot) if parallel > 1 else ()
    planned = plan_launch(arguments, nproc or (each if gpus else None), None, len(own or gpus))
    command = planned.command if planned else (sys.executable, "-m", "mtl_dist", *arguments)
    num_processes = planned.num_processes if planned else 1
    threads = max(1, len(os.sched_getaffinity(0)) // (num_processes * parallel))
    return Launch(command, num_processes, threads, own)


def share_of(gpus: Sequence[str], each: int, slot: int) -> tuple[str, ...]:
    """The GPUs of the training at `slot`, which wants `each`; with fewer GPUs than wanted several share one.

    >>> share_of(["0", "1", "2", "3"], 2, 1), share_of(["0"], 1, 3)
    (('2', '3'), ('0',))
    """
    return tuple(gpus[(slot * each + number) % len(gpus)] for number in range(min(each, len(gpus))))
