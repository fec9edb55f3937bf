"""What a task's failure to be learnt by heart is due to, by what was seen, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mtl_dist.batch import Batch
from mtl_dist.cell_table import CellTable
from mtl_dist.debug.pictures import words_of
from mtl_dist.kinds.registry import kind_of
from mtl_dist.models.weights import is_adapter
from mtl_dist.plural import readable
from mtl_dist.specs import TaskInfo
from mtl_dist.step import RootModule

_FAR_MEAN, _FAR_STD = 2.0, 5.0
_FEW = 20  # steps that say nothing of a learning rate
_MOVED = 0.05
"""A loss that changed by less of what it was has hardly moved."""
_FELL = 0.98
"""A loss that came below so much of what it was a tenth of the steps before still falls."""
_ROSE = 10.0
"""A loss that was so many times what it began with was thrown off by its steps."""


@dataclass
class Seen:
    """What the overfitting of a batch has shown; losses step by step."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    blamed: str = ""
    """Where a loss or gradient first was not finite."""
    bad_gradient: bool = False
    """Whether the last step's gradient was not finite, though its losses were."""
    out_of_time: bool = False

    @property
    def steps(self) -> int:
        return max(map(len, self.losses.values()), default=0)

    @property
    def undecided(self) -> bool:
        """Whether the time was over after too few steps to say anything of them."""
        return self.out_of_time and self.steps < _FEW


def verdict(root: RootModule, batch: Batch, seen: Seen, lr: float, dead: Collection[str]) -> CellTable:
    """A row for each task: its metric on the batch, the goal, and what to make of it."""
    table = CellTable(box=None, pad_edge=False)
    for column in ("task", "metric on the batch", "reached", "wanted", ""):
        table.add_column(column)
    images = about_images(root, batch)
    for name, task in root.tasks.items():
        metric, goal = task.settings.learnt_by_heart
        value = seen.reached.get(name)
        said = about_task(root, name, batch, seen, lr, dead, images)
        table.add_row(name, metric, "-" if value is None else readable(value), f"{goal:g}", said)
    return table


def about_task(
    root: RootModule,
    name: str,
    batch: Batch,
    seen: Seen,
    lr: float,
    dead: Collection[str],
    images: Sequence[str],
) -> str:
    """One task's verdict in words."""
    task, value = root.tasks[name], seen.reached.get(name)
    num_labelled = int(batch.labelled[name].sum())
    if num_labelled == 0:
        return f"no label among the {len(batch)} samples"
    constant = constant_label(root, name, batch)
    if value is not None and task.settings.has_learnt(value):
        shows = f", but every label here is {constant}, which shows little" if constant else ""
        return f"overfitted{shows}"
    broken = [
        about_not_finite(seen, name),
        about_constant(task.info, constant) if constant else "",
        _twins(root, name, batch),
        *images,
    ]
    slow = [_frozen(root, name), _unreached(name, dead), _weighted(root, name), about_rate(seen, name, lr)]
    # What the data or a broken step makes impossible, no learning rate helps.
    found = [reason for reason in broken if reason] or [reason for reason in slow if reason]
    losses = seen.losses.get(name, [])
    if seen.undecided and losses and not found:
        return f"not decided: its loss went from {losses[0]:.3g} to {losses[-1]:.3g} in {len(losses)} steps"
    return "NOT overfitted. " + ". ".join(found or [task.settings.if_not_learnt]) + "."


def about_images(root: RootModule, batch: Batch) -> list[str]:
    """What is odd about the images as the network takes them; nothing where they are as usual."""
    with torch.no_grad():
        values = root.model.normalise(batch.images_BCHW).float()
    mean, std = float(values.mean()), float(values.std())
    if float(values.std(dim=0).max()) == 0 and len(batch) > 1:
        return ["All images are the same"]
    if abs(mean) > _FAR_MEAN or not 1 / _FAR_STD <= std <= _FAR_STD:
        return [
            f"Normalised images have mean {mean:.3g} and std {std:.3g}, far from 0 and 1: try "
            "model.normalise=data"
        ]
    return []


def constant_label(root: RootModule, name: str, batch: Batch) -> str:
    """The one label of all labelled samples, in words; empty where there are several, or they are maps."""
    info = root.tasks[name].info
    if kind_of(info.kind).is_map:
        return ""
    words = {words_of(batch, row, name, info) for row in range(len(batch)) if batch.labelled[name][row]}
    return words.pop() if len(words) == 1 else ""


def about_constant(info: TaskInfo, constant: str) -> str:
    """What to do where all labels of the batch are one: other samples help only if there are other labels."""
    others = not (kind_of(info.kind).is_number and info.num_labelled and info.spread == 0)
    then = "Try another train.seed" if others else "So is every label to train on: take the task out"
    return f"Every label here is {constant}: there is nothing to tell apart. {then}"


def about_not_finite(seen: Seen, name: str) -> str:
    losses = seen.losses.get(name, [])
    step = next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is not None:
        return f"Its loss was {losses[step - 1]} at step {step}{seen.blamed}"
    if seen.bad_gradient:
        return f"The gradient was not finite at step {seen.steps}{seen.blamed}"
    broken = [other for other, them in seen.losses.items() if not all(map(math.isfinite, them))]
    return f"It ended with the loss of {broken[0]}, at step {seen.steps}" if broken else ""


def _twins(root: RootModule, name: str, batch: Batch) -> str:
    """Two images that are equal to the pixel with different labels: both cannot be learnt."""
    info = root.tasks[name].info
    rows = [row for row in range(len(batch)) if batch.labelled[name][row]]
    for number, one in enumerate(rows):
        for other in rows[number + 1 :]:
            same = batch.images_BCHW[one].equal(batch.images_BCHW[other])
            if same and not _equal(batch.targets[name][one], batch.targets[name][other]):
                said = [words_of(batch, row, name, info) for row in (one, other)]
                labels = f" ({said[0]}, {said[1]})" if any(said) else ""
                return f"{batch.keys[one]} and {batch.keys[other]} are the same image with two labels{labels}"
    return ""


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one.float(), nan=-1e9), torch.nan_to_num(other.float(), nan=-1e9))


def _frozen(root: RootModule, name: str) -> str:
    if not root.model.frozen:
        return ""
    if any(is_adapter(name) for name, _ in root.model.named_parameters()):
        return "The backbone is frozen but for its adapters: try a larger model.adapter.rank"
    return "The backbone is frozen, so that only heads learn: try model.frozen=false"


def _unreached(name: str, dead: Collection[str]) -> str:
    own = [layer for layer in dead if layer == f"heads.{name}" or layer.startswith(f"heads.{name}.")]
    return f"No gradient reaches {own[0]}" if own else ""


def _weighted(root: RootModule, name: str) -> str:
    weights: Mapping[str, float] = root.term_weights
    largest = max(weights.values())
    if weights[name] == 0:
        return f"Its weight is 0: try tasks.{name}.weight=1"
    if weights[name] < largest / 100:
        return f"Its weight is {weights[name]:g} beside {largest:g}: try tasks.{name}.weight={largest:g}"
    return ""


def about_rate(seen: Seen, name: str, lr: float) -> str:
    losses = [loss for loss in seen.losses.get(name, []) if math.isfinite(loss)]
    if len(losses) < _FEW:
        return ""
    tenth = len(losses) // 10
    parts = losses[:tenth], losses[-2 * tenth : -tenth], losses[-tenth:]
    first, before, last = (sum(part) / tenth for part in parts)
    moved = f"Its loss went from {first:.3g} to {last:.3g} in {len(losses)} steps at optim.lr={lr:g}"
    if abs(last - first) < _MOVED * abs(first) and max(losses) - min(losses) < 2 * _MOVED * abs(first):
        return f"{moved}: try a larger one, such as {10 * lr:g}"
    peak = max(losses)
    if peak > _ROSE * max(losses[0], last):
        return (
            f"Its loss rose from {losses[0]:.3g} to {peak:.3g} and then stayed at {last:.3g} in "
            f"{len(losses)} steps at optim.lr={lr:g}: try a smaller one, such as {lr / 10:g}"
        )
    if last >= first:
        return f"{moved}: try a smaller one, such as {lr / 10:g}"
    if last < (before if seen.out_of_time else _FELL * before):
        until = " when the time was over" if seen.out_of_time else ""
        return f"{moved}, and still fell{until}: try a larger one, such as {10 * lr:g}"
    return ""
