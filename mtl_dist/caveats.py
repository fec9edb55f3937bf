"""What is odd about a run before it starts: refused where its result would be wrong, else one line each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from mtl_dist.data.first_look import odd_normalisation
from mtl_dist.data.leakage import leakage
from mtl_dist.data.loader import Data
from mtl_dist.data.val_labels import tasks_labelled_in, val_gaps
from mtl_dist.engine.rank_environment import unused_slurm_tasks
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.norm_inputs import FEW, fewest_values
from mtl_dist.plural import plural
from mtl_dist.recipe import Recipe
from mtl_dist.step import RootModule
from mtl_dist.tasks.metrics import MEAN_ACCURACY


def check_norms(root: RootModule, data: Data, micro_batch: int, world: World) -> str:
    """What to say of BatchNorm layers with few values per channel; nothing where they have enough.

    Raises:
        UserError: one has a single value, which is its own mean: all that it lets through is 0.
    """
    if micro_batch >= FEW:
        return ""
    dtype = torch.uint8 if data.image_dtype == "uint8" else torch.float32
    found = fewest_values(root.model, torch.zeros(1, data.channels, *data.image_size, dtype=dtype))
    if found is None:
        return ""
    name, per_image = found
    if isinstance(dict(root.model.named_modules())[name], torch.nn.SyncBatchNorm):
        micro_batch *= world.size
    values = micro_batch * per_image
    of = f"{name}, of {plural(micro_batch, 'image')} at a time"
    remedy = "Use model.norm=group, larger micro-batches or larger images"
    if values == 1:
        raise UserError(f"model.norm: expected two or more values per channel, found one in {of}. {remedy}.")
    if values < FEW:
        return f"BatchNorm takes its statistics from {values} values per channel in {of}. {remedy}."
    return ""


def caveats(recipe: Recipe, data: Data, root: RootModule, world: World) -> Iterator[str]:
    """Collective: one line for each thing that makes less of the run than one might think."""
    for name, info in data.task_infos.items():
        if info.num_labelled == 0:
            yield f"task {name} has no label in the training data: its head stays as it is."
    yield from remarks(root.model)
    yield from val_gaps(data)
    yield from averaged_tasks(recipe, data)
    yield from world.on_main(lambda: list(leakage(data)))
    mean, std = (buffer.flatten().tolist() for buffer in (root.model.mean, root.model.std))
    yield from world.on_main(lambda: list(odd_normalisation(data, mean, std)))
    unused = unused_slurm_tasks(os.environ)
    if unused:
        yield unused


def remarks(model: MultitaskModel) -> Iterator[str]:
    """What decoders say of the maps that they read, once for all tasks of which it holds."""
    found: dict[str, list[str]] = {}
    for name, head in model.heads.items():
        found.setdefault(getattr(head, "remark", ""), []).append(name)
    for remark, tasks in found.items():
        if remark:
            yield f"{', '.join(tasks)}: {remark}"


def check_monitor(recipe: Recipe, data: Data) -> None:
    """Refuse to follow a metric that no evaluation will have: no checkpoint would be the best.

    Raises:
        UserError: of a task without a label in val, which has samples.
    """
    if "val" not in data.splits:
        return
    measured = tasks_labelled_in(data, "val")
    for metric in recipe.monitor.names:
        split, _, rest = metric.partition("/")
        task = rest.rpartition("/")[0]
        if split == "val" and task in recipe.tasks and task not in measured:
            raise UserError(
                f"monitor: expected a metric of a task with labels in val ({', '.join(measured)}), found "
                f"{metric}: nothing would be the best. Choose another, such as val/loss."
            )


def averaged_tasks(recipe: Recipe, data: Data) -> Iterator[str]:
    """Which tasks a monitored average is over, where it leaves some out."""
    for metric in recipe.monitor.names:
        split, _, name = metric.partition("/")
        tasks = tasks_labelled_in(data, split) if split in data.splits else []
        if name == MEAN_ACCURACY:
            tasks = [task for task in tasks if "accuracy" in recipe.tasks[task].modes]
        elif name == "loss":
            tasks = [task for task in tasks if recipe.tasks[task].weight > 0]
        else:
            continue
        if tasks and len(tasks) < len(recipe.tasks):
            yield (
                f"{metric}, which decides what is best, is over {', '.join(tasks)} alone "
                f"({len(tasks)} of {plural(len(recipe.tasks), 'task')})."
            )
