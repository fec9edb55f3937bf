"""What `mtl compare` trains: single-task models, equal weights and the chosen methods, each with every seed.

All have the same data, model, optimizer, epochs and seeds; a single-task model sees the same samples, also
those without a label of its task, but not the datasets that know nothing of it: of disjoint datasets it
trains on its own, as often as the others do, in fewer steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mtl_dist.balance.fixed import Fixed
from mtl_dist.config.settings import Settings
from mtl_dist.data.settings import UniformSampling
from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.report.compare_metrics import CONTROL, SINGLE
from mtl_dist.tasks.task import CommonTaskSettings

S = TypeVar("S", bound=Settings)
V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to train.

    name    as in the tables: a method with what was said of it (`cagrad:c=0.5`), or `single-task digit`
    recipe  of the first seed
    single  the task of a single-task model
    """

    name: str
    recipe: Recipe
    single: str | None = None

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name).strip("-")

    def of_seed(self, seed: int) -> Recipe:
        return _with(self.recipe, train=_with(self.recipe.train, seed=seed))


@dataclass(frozen=True)
class Plan:
    """Everything to train, and what was changed of the recipe for the sake of a fair comparison."""

    tasks: Mapping[str, CommonTaskSettings]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...]


def plan_comparison(path: Path, overrides: Sequence[str], methods: Sequence[str], num_seeds: int) -> Plan:
    """The contenders of the recipe at `path`; equal weights are always one of them.

    `methods` are `NAME` or `NAME:KEY=VALUE:KEY=VALUE`, with the keys of `balance:`. A method that the recipe
    itself balances by, named without keys, has the recipe's settings.

    Raises:
        UserError: one line per mistake in the recipe or in a method; fewer than two tasks.
    """
    given = load_recipe(path, overrides)
    if len(given.tasks) < 2:
        raise UserError(f"tasks: expected at least two to balance, found {len(given.tasks)}.")
    notes: list[str] = []
    names = dict.fromkeys([CONTROL, *_own_methods(given), *methods])
    contenders = [_single(given, task, notes) for task in given.tasks]
    contenders += [_balanced(path, overrides, given, name, notes) for name in names]
    if given.monitor.patience is not None:
        notes.append("monitor.patience is not used: all train for as long as the recipe says.")
    seed = given.train.seed
    return Plan(
        tasks=given.tasks,
        contenders=tuple(_fair(contender) for contender in contenders),
        seeds=tuple(range(seed, seed + num_seeds)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _own_methods(given: Recipe) -> list[str]:
    """Task weights that somebody has tuned are a second control."""
    tuned = any(task.weight != 1 for task in given.tasks.values())
    return ["fixed"] if tuned and isinstance(given.balance, Fixed) else []


def _single(given: Recipe, task: str, notes: list[str]) -> Contender:
    """The recipe with one task alone."""
    monitor = given.monitor
    lacking = [
        name
        for name in monitor.names
        if name not in ("val/loss", "train/loss") and name.split("/")[1] != task
    ]
    if lacking:
        monitor = _with(monitor, metric="val/loss", mean=None, mode=None)
        notes.append(
            f"single-task {task}: the best checkpoint is by val/loss, as it has no "
            f"{' and no '.join(lacking)}."
        )
    data = given.data
    if data.sampling.kind == "class_balanced" and data.sampling.task != task:
        data = _with(data, sampling=UniformSampling())
        notes.append(f"single-task {task}: samples come as they are, not balanced by another task's classes.")
    recipe = _with(
        given,
        tasks={task: _with(given.tasks[task], weight=1.0)},
        balance=Fixed(diagnose_every=0),
        model=_with(given.model, heads=_only(given.model.heads, task)),
        optim=_with(given.optim, task_lr=_only(given.optim.task_lr, task)),
        monitor=monitor,
        data=data,
    )
    return Contender(f"{SINGLE} {task}", recipe, task)


def _balanced(path: Path, overrides: Sequence[str], given: Recipe, name: str, notes: list[str]) -> Contender:
    """The recipe under a method."""
    method, *options = name.split(":")
    recipe = given
    if options or method != given.balance.method:
        stated = [f"diagnose_every: {given.balance.diagnose_every}", f"method: {method}"]
        stated += [_key_and_value(name, option) for option in options]
        recipe = load_recipe(path, [*overrides, f"balance={{{', '.join(stated)}}}"])
    uses_weights = recipe.balance.uses_task_weights
    if not uses_weights and any(task.weight != 1 for task in recipe.tasks.values()):
        notes.append(f"{name}: the tasks' weights are 1, since the method does not look at them.")
        weightless = {task: _with(settings, weight=1.0) for task, settings in recipe.tasks.items()}
        recipe = _with(recipe, tasks=weightless)
    return Contender(name, recipe)


def _key_and_value(name: str, option: str) -> str:
    key, equals, value = option.partition("=")
    if not (key and equals and value):
        raise UserError(
            f'--methods: expected NAME or NAME:KEY=VALUE, found "{name}". Write for example cagrad:c=0.5.'
        )
    return f"{key}: {value}"


def _fair(contender: Contender) -> Contender:
    """No early end and an evaluation at the end for all, under the contender's name."""
    recipe = contender.recipe
    recipe = _with(
        recipe,
        name=contender.folder,
        monitor=_with(recipe.monitor, patience=None),
        train=_with(recipe.train, evaluate_at_end=True),
    )
    return Contender(contender.name, recipe.with_absolute_paths(), contender.single)


def _with(settings: S, **changes: object) -> S:
    return settings.model_copy(update=changes)


def _only(by_task: Mapping[str, V], task: str) -> dict[str, V]:
    return {name: value for name, value in by_task.items() if name == task}
