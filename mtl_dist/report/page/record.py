"""What a run folder says, read once for its page; without a path, a host or a user in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mtl_dist.checkpoint import Best, known_bests
from mtl_dist.config.loading import to_yaml
from mtl_dist.data.facts import DataFacts
from mtl_dist.errors import UserError
from mtl_dist.intervals import Interval, intervals
from mtl_dist.prediction.evaluated import read_predictions
from mtl_dist.recipe import Recipe, flat, load_recipe_of
from mtl_dist.run_folder import RunFolder
from mtl_dist.sample_rows import Table
from mtl_dist.status import Status, read_status
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tasks.task import Task
from mtl_dist.tracking.files import history_of, read_rows

_PATH = re.compile(r"(?<![\w.:/~-])(?:~/|/|[A-Za-z]:\\)(?:[^\s/\\'\",;:\[\]{}]+[/\\])+|(?<![\w.:/~-])~/")


def without_paths(text: str) -> str:
    """The text with the folders of absolute paths left out: what a machine is like is nobody's business.

    >>> without_paths("path: /home/ann/data/digits, ~/x/y.zip; s3://bucket/a/b")
    'path: …/digits, …/y.zip; s3://bucket/a/b'
    """
    return _PATH.sub("…/", text)


@dataclass(frozen=True)
class RunRecord:
    """One run: its recipe, what its data is, what it wrote down, and what it reached.

    metrics, baselines  by split and task
    per_class           by split, task and class (number, point) of those that have several
    tables              a row per sample, of the splits that have such rows
    """

    folder: RunFolder
    recipe: Recipe
    facts: DataFacts
    tasks: dict[str, Task]
    rows: list[dict[str, Any]]
    metrics: dict[str, dict[str, dict[str, float]]]
    per_class: dict[str, dict[str, dict[str, dict[str, float | None]]]]
    baselines: dict[str, dict[str, dict[str, Any]]]
    tables: dict[str, Table]
    status: Status | None
    best: Best | None
    starts: list[dict[str, Any]]
    tags: list[str]

    @property
    def name(self) -> str:
        """`digits/20260101-120000-ab12`: the last two parts of its path."""
        return "/".join(self.folder.directory.resolve().parts[-2:])

    @cached_property
    def history(self) -> dict[str, Any]:
        """The epochs as columns; whole, where the step that ends one only reaches into the next."""
        columns = history_of(self.rows)
        num = sum(source.num_samples for source in self.facts.sources.get("train", ()))
        reach = self.recipe.train.global_batch / num if num else 0.0
        columns["epoch"] = [math.floor(e) if e % 1 < reach and e >= 1 else e for e in columns["epoch"]]
        return columns

    @property
    def split(self) -> str | None:
        """The split that the main numbers are of: test, else val, else another one."""
        return next((one for one in ("test", "val", *self.metrics) if one in self.metrics), None)

    @cached_property
    def intervals(self) -> dict[str, dict[str, dict[str, Interval]]]:
        """By split and task, of the metrics that the rows determine."""
        return {
            split: {name: intervals(task, table.of_task(name)) for name, task in self.tasks.items()}
            for split, table in self.tables.items()
        }

    @cached_property
    def best_row(self) -> dict[str, Any] | None:
        """The row of the evaluation during training by which the best weights were chosen."""
        step = self.best.step if self.best else None
        return next((row for row in self.rows if row["kind"] == "epoch" and row["step"] == step), None)

    def measured(self, split: str, task: str, metric: str) -> float:
        """A result of the best weights, NaN where there is none; of val that of training is as good."""
        values = self.metrics.get(split, {}).get(task)
        if values is None and split == "val" and self.best_row is not None:
            value = self.best_row.get(f"val/{task}/{metric}")
            return math.nan if value is None else value
        return math.nan if values is None else values.get(metric, math.nan)

    @cached_property
    def seconds(self) -> float:
        """How long it trained, over all its starts."""
        begins = [_seconds(start["started"]) for start in self.starts if start.get("started")]
        times = [row["time"] for row in self.rows if "time" in row]
        if not begins or not times:
            return 0.0
        ends = [*begins[1:], math.inf]
        total = 0.0
        for begin, end in zip(begins, ends, strict=True):
            own = [time for time in times if begin - 1 <= time < end]
            total += max(own) - begin if own else 0.0
        return total

    @property
    def went_on(self) -> bool:
        """Whether the newest start had a checkpoint: without one no rows of an earlier start are kept."""
        begun = self.starts[-1].get("started") if self.starts else None
        return begun is not None and any(row.get("time", math.inf) < _seconds(begun) for row in self.rows)

    @cached_property
    def recipe_text(self) -> str:
        """The resolved recipe."""
        return without_paths(to_yaml(self.recipe))

    @cached_property
    def settings(self) -> dict[str, str]:
        """The resolved recipe by dotted keys."""
        values = flat(self.recipe.model_dump(mode="json"))
        return {key: without_paths(_in_yaml(value)) for key, value in values.items()}

    def metric_values(self, kind: str, name: str) -> tuple[list[float], list[float | None]]:
        """A metric of the rows of a kind: their epochs and its values."""
        found = [(row["epoch"], row[name]) for row in self.rows if row["kind"] == kind and name in row]
        return [epoch for epoch, _ in found], [value for _, value in found]


def read_run(run: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: not a run that has begun, or one of its files is damaged.
    """
    folder = RunFolder.open(run)
    recipe = load_recipe_of(folder.directory)
    facts = folder.read_data()
    if facts is None:
        raise UserError(f"{run}: expected a run that has begun, found no data.json. Train it first.")
    metrics = {
        split: {task: _numbers(values) for task, values in tasks.items()}
        for split, tasks in folder.read_metrics().items()
    }
    tables = {}
    for split in metrics:
        table = read_predictions(folder, split)
        if table is not None and len(table):
            tables[split] = table
    bests = known_bests(folder.checkpoints)
    return RunRecord(
        folder=folder,
        recipe=recipe,
        facts=facts,
        tasks=build_tasks(recipe.tasks, facts.task_infos),
        rows=[row for row in read_rows(folder.directory) if row["kind"] != "damaged"],
        metrics=metrics,
        per_class=folder.read_per_class(),
        baselines=folder.read_baselines(),
        tables=tables,
        status=read_status(folder.directory),
        best=bests[0] if bests else None,
        starts=folder.starts(),
        tags=folder.read_tags(),
    )


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _in_yaml(value: Any) -> str:
    """A plain value as YAML has it.

    >>> _in_yaml(None), _in_yaml([True, "a"]), _in_yaml("text")
    ('null', '[true, "a"]', 'text')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
