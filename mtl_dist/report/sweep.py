"""`mtl sweep`: one training per point, here; then a table, sweep.json and sweep.png.

    DIR/<values>/         the run folder of one point; beside it its recipe (.yaml) and what it said (.txt)
    DIR/sweep.json  sweep.png

The same command goes on where it was interrupted; one with more values adds their points.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mtl_dist.cell_table import CellTable
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.figures.sweep import draw_sweep
from mtl_dist.launch.series import Training, train_all
from mtl_dist.launch.sweep import point_labels, short_keys, split_values, sweep_points
from mtl_dist.monitor import MonitorSettings
from mtl_dist.plural import plural, readable
from mtl_dist.printable import printable
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.report.run_list import ListedRun, list_runs, mode_of, number_text, wide
from mtl_dist.tasks.task import Mode

SEED = "train.seed"


@dataclass(frozen=True, eq=False)
class Point(Training):
    """One training of a sweep: its value of every swept key, and the recipe that this makes."""

    values: Mapping[str, str]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """All points; `metric` ranks them, None where they monitor different ones."""

    keys: Sequence[str]
    points: Sequence[Point]
    metric: str | None


@dataclass(frozen=True)
class Results:
    """What the points have reached.

    runs     by point, those that have started
    values   by point, the metric that ranks them; NaN where there is none
    """

    sweep: Sweep
    metric: str
    mode: Mode
    runs: Mapping[Point, ListedRun]
    values: Mapping[Point, float]

    @property
    def ranked(self) -> list[Point]:
        """Best first; those without a value last."""
        return sorted(self.sweep.points, key=lambda point: self.rank(self.values[point]))

    def rank(self, value: float) -> tuple[bool, float]:
        return (True, 0.0) if math.isnan(value) else (False, value if self.mode == "min" else -value)

    def over_seeds(self) -> list[tuple[Mapping[str, str], list[float]]]:
        """By the other values those of all seeds, the best mean first; empty where no seed is swept."""
        if SEED not in self.sweep.keys or len(self.sweep.keys) == 1:
            return []
        groups: dict[tuple[str, ...], list[float]] = {}
        others = [key for key in self.sweep.keys if key != SEED]
        for point in self.sweep.points:
            own = groups.setdefault(tuple(point.values[key] for key in others), [])
            own.extend([] if math.isnan(self.values[point]) else [self.values[point]])
        found = [(dict(zip(others, values, strict=True)), seeds) for values, seeds in groups.items()]
        return sorted(found, key=lambda pair: self.rank(_mean(pair[1])))


def plan_sweep(path: Path, overrides: Sequence[str], directory: Path) -> Sweep:
    """The points of `overrides`, of which those with several values are swept; all recipes are read.

    Raises:
        UserError: one line per mistake in the recipe or a value; none has several values.
    """
    swept = [text for text in overrides if len(split_values(text.partition("=")[2])) > 1]
    constant = [text for text in overrides if text not in swept]
    if not swept:
        raise UserError("sweep: expected at least one A.B=1,2,3 with several values, found none.")
    overridden = list(sweep_points(swept))
    points = []
    for label, point in zip(point_labels(overridden), overridden, strict=True):
        recipe = load_recipe(path, [*constant, *point]).with_absolute_paths()
        values = dict(text.split("=", 1) for text in point)
        points.append(Point(directory / label, values, recipe.model_copy(update={"name": label})))
    alike = all(_followed(point.recipe.monitor) == _followed(points[0].recipe.monitor) for point in points)
    return Sweep(list(points[0].values), points, points[0].recipe.monitor.name if alike else None)


def _followed(monitor: MonitorSettings) -> object:
    """What is followed, as far as two runs are compared by it."""
    return monitor.metric if monitor.mean is None else monitor.mean


def run_sweep(
    sweep: Sweep,
    directory: Path,
    console: Console,
    *,
    nproc: int | None = None,
    parallel: int = 1,
    by: str | None = None,
    tags: Sequence[str] = (),
) -> int:
    """Train what is missing, show and write the results; 0, 1 where a point failed, 128 + n after signal n.

    Raises:
        UserError: the folder holds a sweep of another recipe; no metric to rank by.
    """
    metric = by or sweep.metric
    if metric is None:
        raise UserError("--by: expected a metric, as the points monitor different ones, found none.")
    for point in sweep.points:
        point.write_recipe(point.recipe, "Give the values of before, or another --out for another sweep.")
    failures: dict[Point, str] = {}
    numbers = {point: number for number, point in enumerate(sweep.points, start=1)}

    def say(line: str) -> None:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def started(point: Point) -> None:
        say(f"{numbers[point]}/{len(numbers)}  {point.directory}")

    def ended(point: Point, code: int) -> None:
        if not point.is_done and code < 128:
            failures[point] = point.failure or point.last_words(code)
            say(f"{point.directory.name} failed: {failures[point]}")

    done = sum(point.is_done for point in sweep.points)
    say(f"{plural(len(numbers), 'training')}, {done} of them done, {parallel} at a time.")
    code = train_all(sweep.points, nproc, parallel, started, ended, tags)
    if code:
        say("Stopped; the same command goes on from here.")
        return code
    results = results_of(sweep, metric)
    write(results, directory)
    show(results, console)
    say(f"All of it is in {directory}.")
    return 1 if failures else 0


def results_of(sweep: Sweep, metric: str) -> Results:
    """What the points have reached in `metric`.

    Raises:
        UserError: no point has it.
    """
    started = [point for point in sweep.points if (point.directory / "recipe.yaml").is_file()]
    listed = list_runs([point.directory for point in started])
    runs = dict(zip(started, listed, strict=True))
    mode = mode_of(metric, listed)
    values = {
        point: runs[point].metrics.get(metric, math.nan) if point in runs else math.nan
        for point in sweep.points
    }
    return Results(sweep, metric, mode, runs, values)


def show(results: Results, console: Console) -> None:
    """Print the points, best first; the means over seeds, where seeds are swept; and the best."""
    sweep = results.sweep
    table = CellTable(box=None, pad_edge=False)
    for name in short_keys(sweep.keys):
        table.add_column(name, justify="right", overflow="fold")
    others = [name for name in _shown_metrics(results) if name != results.metric]
    table.add_column(results.metric, justify="right")
    for name in others:
        table.add_column(name, justify="right")
    table.add_column("state")
    for point in results.ranked:
        run = results.runs.get(point)
        cells = [number_text(run.metrics.get(name)) if run else "" for name in others]
        state = run.view.state if run else "not started"
        table.add_row(*point.values.values(), number_text(results.values[point]), *cells, state)
    console = wide(console)
    console.print(table)
    groups = results.over_seeds()
    for values, seeds in groups:
        names = short_keys(list(values))
        said = ", ".join(f"{name}={value}" for name, value in zip(names, values.values(), strict=True))
        spread = f" ±{readable(statistics.stdev(seeds))}" if len(seeds) > 1 else ""
        console.print(
            printable(f"{said}: {number_text(_mean(seeds))}{spread} over {plural(len(seeds), 'seed')}"),
            markup=False,
            highlight=False,
        )
    best = results.ranked[0]
    console.print(
        printable(f"best: {results.metric} {number_text(results.values[best])} in {best.directory}"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _shown_metrics(results: Results) -> list[str]:
    """The ranking metric, and the same on the other splits."""
    name = results.metric.partition("/")[2]
    known = dict.fromkeys(metric for run in results.runs.values() for metric in run.metrics)
    return [metric for metric in known if metric.partition("/")[2] == name]


def write(results: Results, directory: Path) -> None:
    """Write sweep.json and sweep.png."""
    facts = {
        "metric": results.metric,
        "mode": results.mode,
        "keys": list(results.sweep.keys),
        "runs": [
            {
                "run": point.directory.name,
                "values": dict(point.values),
                "state": results.runs[point].view.state if point in results.runs else "not started",
                "value": _or_null(results.values[point]),
                "metrics": {
                    name: _or_null(value)
                    for name, value in (results.runs[point].metrics if point in results.runs else {}).items()
                },
            }
            for point in results.ranked
        ],
        "over_seeds": [
            {"values": dict(values), "mean": _or_null(_mean(seeds)), "seeds": seeds}
            for values, seeds in results.over_seeds()
        ],
    }
    write_text(directory / "sweep.json", json.dumps(facts, indent=1))
    draw_sweep(
        [(point.values, results.values[point]) for point in results.ranked],
        results.metric,
        directory / "sweep.png",
    )


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
