"""What a run tells people: what is about to train, how far it is, and how it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mtl_dist.caveats import caveats
from mtl_dist.config.describe import listed
from mtl_dist.data.loader import Data
from mtl_dist.plural import plural
from mtl_dist.recipe import Recipe
from mtl_dist.run_folder import RunFolder
from mtl_dist.tracking.tracker import Tracker
from mtl_dist.training.plan import Outcome
from mtl_dist.training.trainer import Trainer


def introduce(
    trainer: Trainer, recipe: Recipe, data: Data, folder: RunFolder, engine: str, parameters: str
) -> None:
    """Say what is about to run, and what is odd about it."""
    plan, world, tracker = trainer.plan, trainer.world, trainer.tracker
    micro_batch = plan.micro_batch_on(world.size)
    tracker.say(f"run      {folder.directory}")
    tracker.say(f"data     {data.describe()}")
    tracker.say(f"tasks    {', '.join(f'{name} ({info.kind})' for name, info in data.task_infos.items())}")
    if data.not_learnt:
        tracker.say(f"         not learnt, because the recipe does not name them: {listed(data.not_learnt)}")
    if recipe.absent_tasks:
        tracker.say(f"         not in the data, and optional: {listed(recipe.absent_tasks)}")
    tracker.say(f"model    {recipe.model.backbone_name}, {recipe.train.precision}, {parameters}")
    tracker.say(f"engine   {engine}")
    tracker.say(
        f"batch    {plan.global_batch} = {plural(world.size, 'rank')} x {plan.accumulation} x {micro_batch} "
        f"on {world.device.type}, {plural(plan.total_steps, 'step')}"
    )
    for name, task in trainer.root.tasks.items():
        for line in task.notes():
            tracker.say(f"tasks    {name}: {line}")
    if trainer.metrics is not None:
        for line in trainer.metrics.exceptions(recipe.data):
            tracker.say(f"metrics  {line}")
    why_not = trainer.balancing.why_no_diagnosis
    if recipe.balance.diagnose_every and why_not and len(recipe.tasks) > 1:
        tracker.say(f"balance  the tasks' gradients are not compared: {why_not}.")
    for line in caveats(recipe, data, trainer.root, world):
        tracker.say(f"warning  {line}")
    if trainer.progress.step:
        tracker.say(f"resume   from step {trainer.progress.step}, position {trainer.progress.position}")


@contextmanager
def progress_bar(tracker: Tracker, plan_total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar over the samples of the run, on rank 0's terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if tracker.directory is None or not tracker.console.is_terminal:
        yield lambda samples: None
        return
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=tracker.console, transient=True) as progress:
        bar = progress.add_task("train", total=plan_total, completed=done)
        yield lambda samples: progress.advance(bar, samples)


def farewell(tracker: Tracker, outcome: Outcome, folder: RunFolder) -> None:
    """Say how the run ended and where its files are."""
    if outcome.state == "stopped":
        tracker.say(
            f"Stopped at step {outcome.step} ({outcome.reason}); everything is saved. "
            f"The same command with --run-dir {folder.directory} goes on from there."
        )
        return
    if outcome.reason:
        tracker.say(f"Stopped early at step {outcome.step}: {outcome.reason}.")
    tracker.say(f"The run is in {folder.directory}:")
    for name, what in RunFolder.FILES.items():
        if (folder.directory / name).exists():
            tracker.say(f"  {name:<22} {what}")


def warn(line: str) -> None:
    print(line, file=sys.stderr)
