"""`mtl runs`: finished and running trainings as a list, side by side, or the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mtl_dist.cell_table import CellTable
from mtl_dist.config.errors import suggest
from mtl_dist.config.yaml_text import parse
from mtl_dist.errors import UserError
from mtl_dist.launch.jobs import RunView, view_runs
from mtl_dist.plural import readable
from mtl_dist.run_folder import RunFolder

if TYPE_CHECKING:
    from mtl_dist.tasks.task import Mode

LEFT_OUT = ("name",)
"""Settings that no comparison is about."""
ONLY_HERE = "tasks not in all"
"""In place of the settings of such tasks."""
_AUGMENT = "data.augment"


@dataclass(frozen=True)
class ListedRun:
    """One run: where it stands, and what it has reached.

    metrics   `val/digit/accuracy` and the like: of the best weights, where they were evaluated; of a run
              that is not that far the monitored metric's best value
    problem   what of it cannot be read, or nothing
    """

    view: RunView
    tags: Sequence[str]
    metrics: Mapping[str, float]
    problem: str = ""

    @property
    def path(self) -> Path:
        return self.view.run

    @cached_property
    def settings(self) -> dict[str, str]:
        """The resolved recipe by dotted keys, as text."""
        from mtl_dist.recipe import flat

        values, _ = parse((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        return {key: _text(value) for key, value in flat(values).items()}


def list_runs(runs: Sequence[Path]) -> list[ListedRun]:
    """The runs as they are now."""
    return [_listed(view) for view in view_runs(list(runs))]


def _listed(view: RunView) -> ListedRun:
    tags = RunFolder(view.run).read_tags()
    try:
        return ListedRun(view, tags, metrics_of(view))
    except UserError as error:  # one damaged file does not take away the list
        return ListedRun(view, tags, {}, str(error))


def metrics_of(view: RunView) -> dict[str, float]:
    """What a run has reached, by `split/task/metric`."""
    found: dict[str, float] = {}
    if view.status is not None and view.status.best is not None:
        found[view.status.metric] = view.status.best
    for split, tasks in RunFolder(view.run).read_metrics().items():
        for task, values in tasks.items():
            for name, value in values.items():
                if name != "num_samples":
                    found[f"{split}/{task}/{name}"] = math.nan if value is None else value
    return found


def mode_of(metric: str, runs: Sequence[ListedRun]) -> Mode:
    """Whether `metric` is to grow or to fall, as the recipe of a run that has it knows.

    Raises:
        UserError: no run has it, or it is a user-defined one that does not say.
    """
    run = next((run for run in runs if metric in run.metrics), None)
    if run is None:
        known = sorted({name for run in runs for name in run.metrics})
        raise UserError(f"metric: expected one that a run has, found {metric!r}. {suggest(metric, known)}")
    from mtl_dist.recipe import load_recipe_of
    from mtl_dist.tasks.metrics import MEAN_ACCURACY

    recipe = load_recipe_of(run.path)
    if metric == recipe.monitor.name:
        return recipe.monitor_mode
    task, _, name = metric.partition("/")[2].rpartition("/")
    ranked = {*recipe.tasks[task].modes, *recipe.tasks[task].metrics} if task in recipe.tasks else set()
    if name not in (*ranked, "loss", MEAN_ACCURACY):
        raise UserError(f"metric: expected one of which less or more is better, found {metric!r}.")
    return recipe.mode_of(metric)


def sorted_by(metric: str, runs: Sequence[ListedRun]) -> list[ListedRun]:
    """The runs, best first; those without the metric last.

    Raises:
        UserError: no run has it.
    """
    sign = 1 if mode_of(metric, runs) == "min" else -1

    def key(run: ListedRun) -> tuple[bool, float]:
        value = run.metrics.get(metric, math.nan)
        return math.isnan(value), 0.0 if math.isnan(value) else sign * value

    return sorted(runs, key=key)


def table_of(runs: Sequence[ListedRun], below: Path, metric: str | None, columns: Sequence[str]) -> CellTable:
    """One row per run.

    Raises:
        UserError: a column is neither a setting nor a metric of any of them.
    """
    for column in columns:
        known = {name for run in runs for name in (*run.settings, *run.metrics)}
        if column not in known:
            raise UserError(
                f"--columns: expected settings or metrics, found {column!r}. {suggest(column, known)}"
            )
    table = CellTable(box=None, pad_edge=False)
    for heading in ("run", "state"):
        table.add_column(heading, overflow="fold")
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column(metric or "best", justify="right" if metric else "left", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("tags", overflow="fold")
    for run in runs:
        status = run.view.status
        if metric is not None:
            reached = number_text(run.metrics.get(metric))
        else:
            best = None if status is None else status.best
            reached = f"{status.metric} {readable(best)}" if status and best is not None else ""
        cells = [
            number_text(run.metrics.get(name)) if name in run.metrics else run.settings.get(name, "")
            for name in columns
        ]
        table.add_row(
            str(run.path.relative_to(below)) if run.path != below else run.path.name,
            f"{run.view.state}, damaged" if run.problem else run.view.state,
            f"{status.epoch:.2f}" if status is not None else "",
            reached,
            *cells,
            " ".join(run.tags),
        )
    return table


def comparison_of(runs: Sequence[ListedRun]) -> CellTable:
    """The runs side by side: the settings in which they differ, then every metric that two of them have."""
    table = CellTable(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(f"{run.path.parent.name}/{run.path.name}", justify="right", overflow="fold")
    differing = differing_settings([run.settings for run in runs])
    for key, values in differing.items():
        table.add_row(key, *values, end_section=key == list(differing)[-1])
    names = _in_order(run.metrics for run in runs)
    for name in names:
        known = [run.metrics.get(name) for run in runs]
        if sum(value is not None for value in known) > 1:
            table.add_row(name, *(number_text(value) for value in known))
    return table


def differing_settings(recipes: Sequence[Mapping[str, str]], absent: str = "") -> dict[str, list[str]]:
    """By dotted key the value in each recipe, of the settings that are not the same in all; `absent` is what
    a recipe has not. The tasks that not all have are one of them, by their names."""
    recipes = _spelt_out(recipes)
    tasks = [{key.split(".")[1] for key in recipe if key.startswith("tasks.")} for recipe in recipes]
    in_all = set.intersection(*tasks)
    values = {
        key: [recipe.get(key, absent) for recipe in recipes]
        for key in _in_order(recipes)
        if key not in LEFT_OUT and (not key.startswith("tasks.") or key.split(".")[1] in in_all)
    }
    apart = [", ".join(sorted(names - in_all)) or absent for names in tasks]
    return {key: own for key, own in ({ONLY_HERE: apart} | values).items() if len(set(own)) > 1}


def _spelt_out(recipes: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """The recipes; where one states its augmentation in single values, presets of others are those too."""
    if not any(key.startswith(f"{_AUGMENT}.") for recipe in recipes for key in recipe):
        return recipes
    from mtl_dist.data.transforms import PRESETS
    from mtl_dist.recipe import flat

    presets: dict[str, dict[str, str]] = {
        name: {key: _text(value) for key, value in flat({_AUGMENT: preset.model_dump(mode="json")}).items()}
        for name, preset in PRESETS.items()
    }
    return [
        {
            name: text
            for key, value in recipe.items()
            for name, text in (presets.get(value, {}) if key == _AUGMENT else {key: value}).items()
        }
        for recipe in recipes
    ]


def _in_order(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def number_text(value: float | None) -> str:
    if value is None:
        return ""
    return "-" if math.isnan(value) else readable(value)


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def wide(console: Console) -> Console:
    """A file or a pipe has no width: nothing is cut off there."""
    return console if console.is_terminal else Console(file=console.file, width=10_000)
