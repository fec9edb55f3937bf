"""What a run tells people: what is about to train, how far it is, and how it ended."""

from __future__ import annotations

import shlex
import sys

from mtl_dist.caveats import caveats
from mtl_dist.config.describe import listed
from mtl_dist.data.loader import Data
from mtl_dist.data.val_labels import num_labels
from mtl_dist.kinds.registry import kind_of
from mtl_dist.plural import plural
from mtl_dist.printable import say
from mtl_dist.recipe import Recipe
from mtl_dist.run_folder import RunFolder
from mtl_dist.specs import TaskInfo
from mtl_dist.tracking.tracker import Tracker
from mtl_dist.training.plan import Outcome
from mtl_dist.training.trainer import Trainer

_NUMBERS = 4
"""Numbers of a vector that are described."""


def introduce(
    trainer: Trainer, recipe: Recipe, data: Data, folder: RunFolder, engine: str, parameters: str
) -> None:
    """Say what is about to run, and what is odd about it."""
    plan, world, tracker = trainer.plan, trainer.world, trainer.tracker
    micro_batch = plan.micro_batch_on(world.size)
    tracker.say(f"run      {folder.directory}")
    tracker.say(f"data     {data.describe()}")
    if data.settings.stream is not None:
        tracker.say(
            f"stream   its first {data.num_samples('train'):,} samples say what its labels and pixels are; "
            "which samples a step sees depends on ranks and workers, an epoch is not each sample once, and a "
            "resumed run begins the tars again, in another order."
        )
    for name, info in data.task_infos.items():
        tracker.say(f"task     {name}: {described(info, num_labels(data, name, 'val'))}")
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
            tracker.say(f"task     {name}: {line}")
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


def described(info: TaskInfo, in_val: int) -> str:
    """A task in words: its kind, its labels, and the constant answer that it is to be better than."""
    kind = kind_of(info.kind)
    what = info.kind + (f" of {plural(len(info.classes), *kind.class_words)}" if info.classes else "")
    labels = f"{plural(info.num_labelled, 'label')} in train, {in_val:,} in val"
    counted = sum(info.class_counts)
    if kind.is_one_class and counted:
        largest = max(info.class_counts)
        most = info.classes[info.class_counts.index(largest)]
        return f"{what}, {labels}, majority {most} {largest / counted:.1%}"
    if info.num_labelled and (numbers := kind.numbers(info)):
        said = [
            f"{f'{name} ' if name else ''}{one.mean:.4g} +- {one.spread:.4g} {one.unit}".rstrip()
            for name, one in list(numbers.items())[:_NUMBERS]
        ]
        more = ", ..." if len(numbers) > _NUMBERS else ""
        return f"{what}, {labels}, mean {', '.join(said)}{more}"
    return f"{what}, {labels}"


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
    tracker.say("Next:")
    run = shlex.quote(str(folder.directory))
    for command in (f"report {run}", f"predict {run} IMAGES", f"evaluate {run} --split train --predictions"):
        tracker.say(f"  mtl {command}")


def warn(line: str) -> None:
    say(line, sys.stderr)
