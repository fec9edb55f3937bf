"""`mtl report RUN1 RUN2 ...`: what differs in the recipes, what came out, and the curves over one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtl_dist.figures import svg
from mtl_dist.figures.svg import Series
from mtl_dist.plural import plural
from mtl_dist.printable import printable
from mtl_dist.report.page.build import duration, main_metric, short_names, three
from mtl_dist.report.page.charts import Figure, Listing, words
from mtl_dist.report.page.record import RunRecord
from mtl_dist.report.run_list import differing_settings

_COLOURS = 6


@dataclass(frozen=True)
class SeveralPage:
    """Runs side by side."""

    title: str
    summary: list[str]
    settings: Listing
    about: str
    results: Listing
    legend: tuple[tuple[str, str], ...]
    curves: list[Figure]
    runs: Listing


def build_several(records: Sequence[RunRecord]) -> SeveralPage:
    """Everything of the page of several runs."""
    names = [printable(name) for name in short_names([record.name for record in records])]
    split = next((one for one in ("test", "val") if any(one in r.metrics for r in records)), "val")
    differing = differing_settings([record.settings for record in records], "–")
    rows = [(key, *values) for key, values in differing.items()]
    tasks = list(dict.fromkeys(name for record in records for name in record.tasks))
    return SeveralPage(
        title=f"{plural(len(records), 'run')} side by side",
        summary=[f"{', '.join(names)}. Their recipes differ in {plural(len(rows), 'setting')}."],
        settings=Listing("Settings", ("setting", *names), [tuple(map(printable, row)) for row in rows]),
        about=f"On {split}, of the best weights; in brackets the 95 % interval by the bootstrap over the "
        "samples. ★ marks the best of each row." + _unmeasured(records, names, split),
        results=_results(records, names, tasks, split),
        legend=tuple((_kind(number), name) for number, name in enumerate(names)),
        curves=_curves(records, names, tasks),
        runs=_runs(records, names),
    )


def _unmeasured(records: Sequence[RunRecord], names: Sequence[str], split: str) -> str:
    without = [
        name
        for name, record in zip(names, records, strict=True)
        if not record.metrics.get(split) and (split != "val" or record.best_row is None)
    ]
    if not without:
        return ""
    return f" Not evaluated on it: {', '.join(without)} (mtl evaluate RUN --split {split})."


def _results(records: Sequence[RunRecord], names: Sequence[str], tasks: Sequence[str], split: str) -> Listing:
    rows = []
    for task in tasks:
        having = [record for record in records if task in record.tasks]
        settings = having[0].tasks[task].settings
        for metric in dict.fromkeys([main_metric(having[0], having[0].tasks[task]), *settings.compared]):
            values = [record.measured(split, task, metric) for record in records]
            known = [value for value in values if not math.isnan(value)]
            mode = settings.modes.get(metric)
            best = (
                (max(known) if mode == "max" else min(known)) if known and mode and len(known) > 1 else None
            )
            cells = []
            for record, value in zip(records, values, strict=True):
                found = record.intervals.get(split, {}).get(task, {}).get(metric)
                interval = f" ({three(found[0])} – {three(found[1])})" if found else ""
                cells.append(three(value) + interval + (" ★" if value == best else ""))
            rows.append((printable(task), words(metric), *cells))
    return Listing("Results", ("task", "metric", *names), rows)


def _curves(records: Sequence[RunRecord], names: Sequence[str], tasks: Sequence[str]) -> list[Figure]:
    figures = []
    for task in tasks:
        having = next(record for record in records if task in record.tasks)
        for metric in (main_metric(having, having.tasks[task]), "loss"):
            series = [
                Series(
                    name, record.history["epoch"], record.history["val"][f"{task}/{metric}"], _kind(number)
                )
                for number, (name, record) in enumerate(zip(names, records, strict=True))
                if f"{task}/{metric}" in record.history["val"]
            ]
            drawn = svg.lines(series, f"{task} {metric}", "epoch", whole_x=True)
            figures.append(Figure(f"{printable(task)}: {words(metric)} (val)", drawn))
    return [figure for figure in figures if figure.svg]


def _runs(records: Sequence[RunRecord], names: Sequence[str]) -> Listing:
    rows = []
    for name, record in zip(names, records, strict=True):
        last = record.starts[-1] if record.starts else {}
        _, speeds = record.metric_values("step", "images_per_s")
        known = [speed for speed in speeds if speed is not None]
        rows.append(
            (
                name,
                record.status.state if record.status else "not started",
                f"{record.history['epoch'][-1]:.3g}" if record.history["epoch"] else "0",
                duration(record.seconds),
                f"{last.get('ranks', '–')} × {last.get('device', '–')}",
                svg.short(sorted(known)[len(known) // 2]) if known else "–",
                str(len(record.starts)),
                ", ".join(record.tags),
            )
        )
    head = ("run", "state", "epochs", "time", "processes", "images/s", "starts", "tags")
    return Listing("Runs", head, [tuple(map(printable, row)) for row in rows])


def _kind(number: int) -> str:
    return f"s{number}" if number < _COLOURS else "faint"
