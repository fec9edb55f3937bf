"""`mtl report RUN`: everything that a page of one run shows, in the order in which it is shown."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.figures import svg
from mtl_dist.figures.conflicts import PREFIX, conflicts_in
from mtl_dist.figures.svg import Series
from mtl_dist.kinds.registry import kind_of
from mtl_dist.plural import plural
from mtl_dist.printable import printable
from mtl_dist.report.page.charts import (
    Figure,
    Listing,
    confusions,
    figures_of,
    hardest_classes,
    parts_listing,
    unit_of,
    words,
)
from mtl_dist.report.page.pictures import Gallery, Samples
from mtl_dist.report.page.record import RunRecord
from mtl_dist.tasks.task import Task

_SHOWN_TASKS = 12
"""Tasks of which pictures are shown."""
_MORE_CURVES = 5
_BARS = 24
_NUMBERS = 6
"""Numbers of a vector that are described."""


@dataclass(frozen=True)
class Number:
    """A metric as the page says it: its value, its interval, and the constant answer's value beside it."""

    metric: str
    value: str
    low: str = ""
    high: str = ""
    baseline: str = ""
    baseline_name: str = ""
    better: bool | None = None
    bar: Mapping[str, float] = field(default_factory=dict)
    """Where on a line from 0 to 100 the baseline, the value and the interval's ends are."""


@dataclass(frozen=True)
class TaskPage:
    """The section of a task."""

    name: str
    kind: str
    about: str
    number: Number | None
    metrics: Listing
    curves: list[Figure]
    figures: list[Figure]
    listings: list[Listing]
    galleries: list[Gallery]


@dataclass(frozen=True)
class Page:
    """The page of one run, ready to be written."""

    title: str
    state: str
    summary: list[str]
    split: str
    num_samples: str
    tasks: list[TaskPage]
    together: list[Figure]
    together_words: list[str]
    labels: Listing
    classes: list[Figure]
    machine: list[Figure]
    log_every: int
    environment: Listing
    recipe: str
    notes: list[str]


def build_page(record: RunRecord, pictures: bool = True) -> Page:
    """Everything of a run's page. Without `pictures` no sample is read and no model loaded."""
    split = record.split
    samples = Samples(record, split) if pictures and split in record.tables else None
    tasks = [
        task_page(record, task, samples if number < _SHOWN_TASKS else None)
        for number, task in enumerate(record.tasks.values())
    ]
    together, together_words = together_figures(record)
    notes = []
    if split is None:
        notes.append("Nothing was evaluated yet: mtl evaluate RUN fills in the results.")
    elif split not in record.tables:
        notes.append(
            f"There are no predictions of {split} samples, so their charts are missing: "
            f"mtl evaluate RUN --split {split} --predictions makes them."
        )
    if samples is not None and samples.problem:
        notes.append(samples.problem)
    num = len(record.tables[split]) if split in record.tables else 0
    return Page(
        title=printable(record.name),
        state=record.status.state if record.status else "not started",
        summary=summary_of(record),
        split=split or "",
        num_samples=f"{num:,}" if num else "",
        tasks=tasks,
        together=together,
        together_words=together_words,
        labels=labels_of(record),
        classes=class_figures(record),
        machine=machine_figures(record),
        log_every=record.recipe.train.log_every,
        environment=environment_of(record),
        recipe=record.recipe_text,
        notes=notes,
    )


# ---------------------------------------------------------------- the head
def summary_of(record: RunRecord) -> list[str]:
    """The run in a few sentences."""
    recipe, facts = record.recipe, record.facts
    num_train = sum(source.num_samples for source in facts.sources.get("train", ()))
    names = list(dict.fromkeys(source.name for source in facts.sources.get("train", ())))
    steps = [row["step"] for row in record.rows]
    epochs = record.history["epoch"]
    last = record.starts[-1] if record.starts else {}
    on = f"{plural(last.get('ranks', 1), 'process', 'processes')} on {last.get('device', '?')}"
    first = (
        f"{plural(len(record.tasks), 'task')} ({', '.join(record.tasks)}) trained with "
        f"{recipe.model.backbone_name} on {plural(num_train, 'sample')} of {', '.join(names) or 'its data'}, "
        f"at {facts.image_size[0]} × {facts.image_size[1]} px"
    )
    how = [f"{plural(steps[-1] if steps else 0, 'step')} of {recipe.train.global_batch}"]
    if epochs:
        how.insert(0, f"{plural(math.floor(epochs[-1] + 1e-9), 'epoch')}")
    if record.seconds:
        how.append(f"in {duration(record.seconds)}")
    sentences = [f"{first}: {', '.join(how)}, {on}."]
    if record.best is not None:
        sentences.append(
            f"The results are those of step {record.best.step:,}, the best by {record.best.metric} "
            f"({svg.short(record.best.value)})."
        )
    status = record.status
    if status is not None and status.state != "done":
        why = f": {status.reason.splitlines()[-1]}" if status.reason else ""
        sentences.append(f"It is {status.state} at step {status.step:,} of {status.total_steps:,}{why}.")
    if len(record.starts) > 1:
        went_on = " and went on from its checkpoints" if record.went_on else ""
        sentences.append(f"It was started {len(record.starts)} times{went_on}.")
    return [printable(sentence) for sentence in sentences]


def duration(seconds: float) -> str:
    """A time in the two largest of its units.

    >>> duration(42), duration(130), duration(7325)
    ('42 s', '2 min 10 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# ---------------------------------------------------------------- a task
def task_page(record: RunRecord, task: Task, samples: Samples | None) -> TaskPage:
    """The section of one task, from the main split."""
    split = record.split or ""
    columns = record.tables[split].of_task(task.name) if split in record.tables else {}
    matrix = confusion_of(record, task, split)
    listings = []
    if matrix is not None and not kind_of(task.info.kind).is_map:
        listings.append(hardest_classes(matrix, task.info.classes))
        found = confusions(matrix, task.info.classes)
        listings += [found] if found else []
    parts = record.per_class.get(split, {}).get(task.name, {})
    if parts and (matrix is None or kind_of(task.info.kind).is_map):
        listings.append(parts_listing(task, parts))
    return TaskPage(
        name=printable(task.name),
        kind=task.info.kind.rpartition(".")[2],
        about=about(task),
        number=main_number(record, task, split),
        metrics=metrics_listing(record, task),
        curves=curves_of(record, task),
        figures=figures_of(task, columns, matrix),
        listings=listings,
        galleries=samples.galleries(task, columns) if samples is not None else [],
    )


def about(task: Task) -> str:
    """What is to be learnt, in words."""
    info = task.info
    parts = [f"{plural(info.num_labelled, 'label')} in train"]
    if info.classes:
        parts.insert(0, plural(len(info.classes), *kind_of(info.kind).class_words))
    for name, one in list(kind_of(info.kind).numbers(info).items())[:_NUMBERS]:
        unit = f" {one.unit}" if one.unit else ""
        parts.append(
            f"mean {f'{name} ' if name else ''}{svg.short(one.mean)} ± {svg.short(one.spread)}{unit}"
        )
    loss = getattr(task.settings, "loss", None)
    name = str(getattr(loss, "kind", "")).rpartition(".")[2]
    parts += [f"loss {name}"] if name else []
    parts += [f"weight {svg.short(task.settings.weight)}"] if task.settings.weight != 1 else []
    return printable(", ".join(parts))


def main_metric(record: RunRecord, task: Task) -> str:
    """The one metric that is shown large: the monitored one, if it is of this task, else the kind's own."""
    for name in record.recipe.monitor.names:
        metric = name.partition(f"/{task.name}/")[2]
        if metric and metric != "loss":
            return metric
    return task.settings.compared[0]


def main_number(record: RunRecord, task: Task, split: str) -> Number | None:
    metric = main_metric(record, task)
    return number_of(record, task, split, metric)


def number_of(record: RunRecord, task: Task, split: str, metric: str) -> Number | None:
    """A metric with its interval and baseline; None where it was not measured."""
    value = record.metrics.get(split, {}).get(task.name, {}).get(metric, math.nan)
    if math.isnan(value):
        return None
    found = record.intervals.get(split, {}).get(task.name, {}).get(metric)
    baseline = record.baselines.get(split, {}).get(task.name, {})
    reached = baseline.get("metrics", {}).get(metric)
    mode = task.settings.modes.get(metric)
    better = None
    if reached is not None and mode is not None:
        edge = value if found is None else found[0] if mode == "max" else found[1]
        better = edge > reached if mode == "max" else edge < reached
    unit = unit_of(task, metric)
    return Number(
        metric=words(metric),
        value=three(value) + unit,
        low=three(found[0]) if found else "",
        high=three(found[1]) if found else "",
        baseline=three(reached) if reached is not None else "",
        baseline_name=str(baseline.get("name", "")),
        better=better,
        bar=_bar(value, found, reached, mode),
    )


def _bar(value: float, found: Any, reached: float | None, mode: str | None) -> dict[str, float]:
    if reached is None or mode is None:
        return {}
    low, high = found or (value, value)
    end = max(reached, high) * 1.05 if mode == "min" or max(high, value) > 1 else 1.0
    start = min(0.0, low, reached)
    if end <= start:
        return {}
    return {
        name: round(100 * min(1.0, max(0.0, (number - start) / (end - start))), 2)
        for name, number in (("value", value), ("low", low), ("high", high), ("baseline", reached))
    }


def three(value: float) -> str:
    """Three digits behind the point of what is around 1, three digits in all of larger numbers.

    >>> three(0.98513), three(13.618), three(0.00012), three(1234.5), three(-0.0), three(3.079e11)
    ('0.985', '13.6', '0.00012', '1,234', '0.000', '3.08e+11')
    """
    if value != value:
        return "–"
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:z.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


def metrics_listing(record: RunRecord, task: Task) -> Listing:
    """Every metric in every split, with intervals, and the constant answer's."""
    splits = list(record.metrics)
    names = list(dict.fromkeys(name for split in splits for name in record.metrics[split].get(task.name, {})))
    head = ["metric"]
    for split in splits:
        baseline = record.baselines.get(split, {}).get(task.name, {}).get("name")
        head += [split, "95 %", f"{baseline}"] if baseline else [split, "95 %"]
    rows = []
    for name in names:
        row = [words(name)]
        for split in splits:
            value = record.metrics[split].get(task.name, {}).get(name, math.nan)
            whole = name == "num_samples"
            found = record.intervals.get(split, {}).get(task.name, {}).get(name)
            row += [
                f"{value:,.0f}" if whole else three(value),
                f"{three(found[0])} – {three(found[1])}" if found else "",
            ]
            baseline = record.baselines.get(split, {}).get(task.name)
            if baseline:
                reached = baseline["metrics"].get(name)
                row.append("" if reached is None or whole else three(reached))
        rows.append(tuple(row))
    return Listing("All metrics", tuple(head), rows)


def confusion_of(record: RunRecord, task: Task, split: str) -> np.ndarray | None:
    """The counts that the evaluation has written, rows true; None where there are none.

    Raises:
        UserError: the file is damaged.
    """
    path = record.folder.evaluation / f"{split}_{task.name}_confusion.csv"
    if not path.is_file():
        return None
    number = len(task.info.classes)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        if [len(row) for row in rows] != [number + 1] * number:
            raise ValueError(f"it has not {number} rows of {number} counts")
        return np.array([[float(cell) for cell in row[1:]] for row in rows])
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: expected how often each class was taken for each, found a damaged file ({error}). "
            f"Write it again: mtl evaluate RUN --split {split}."
        ) from None


def curves_of(record: RunRecord, task: Task) -> list[Figure]:
    """The main metric large, then the loss and a few others; the best step is marked."""
    main = main_metric(record, task)
    names = [main, "loss", *(name for name in task.settings.compared if name != main)]
    names += [name for name in task.settings.metrics if name not in names]
    history, best = record.history, record.best
    marks = []
    if best is not None and best.step in history["step"]:
        marks = [(history["epoch"][history["step"].index(best.step)], f"best, step {best.step:,}")]
    figures = []
    for name in names[: 1 + _MORE_CURVES]:
        series = [
            Series(
                split,
                history["epoch"],
                history[split][f"{task.name}/{name}"],
                kind,
                dots=len(history["epoch"]) < 8,
            )
            for split, kind in (("train", "s-train"), ("val", "s0"))
            if f"{task.name}/{name}" in history[split]
        ]
        large = name == main
        drawn = svg.lines(
            series,
            f"{task.name} {name} by epoch",
            "epoch",
            marks=marks,
            whole_x=True,
            size=(560, 260) if large else (svg.WIDTH, svg.HEIGHT),
        )
        legend = (("s-train", "train"), ("s0", "val")) if large else ()
        figures.append(Figure(words(name), drawn, wide=large, legend=legend))
    return [figure for figure in figures if figure.svg]


# ---------------------------------------------------------------- the tasks together, the data, the machine
def together_figures(record: RunRecord) -> tuple[list[Figure], list[str]]:
    """Which tasks conflict, the cosines of their gradients and their weights over time."""
    found = conflicts_in(record.rows)
    if found is None or len(found.tasks) < 2:
        return [], []
    numbers = np.where(found.compared_TT > 0, np.round(found.cosines_TT, 2), 0.0)
    matrix = svg.matrix(
        found.cosines_TT, found.tasks, found.tasks, "mean cosine of gradients", numbers=numbers, signed=True
    )
    figures = [
        Figure(
            "Mean cosine of gradients",
            matrix,
            "Above 0 two tasks pull the shared weights the same way, below 0 against one another.",
            legend=(("share-minus", "−1"), ("share-0", "0"), ("share-2", "+1")),
        )
    ]
    sentences = [printable(line) for line in found.sentences()]
    if found.compared_TT.max() < 2:
        return figures, sentences  # a point is no curve
    pairs = sorted(found.cosines, key=lambda pair: float(np.mean(found.cosines[pair])))[:6]
    series, legend = [], []
    for number, (first, second) in enumerate(pairs):
        x, y = record.metric_values("balance", f"{PREFIX}{first}/{second}")
        series.append(Series(f"{first}, {second}", x, y, f"s{number}", dots=len(x) < 8))
        legend.append((f"s{number}", f"{first}, {second}"))
    drawn = svg.lines(series, "cosine of gradients over time", "epoch", y=(-1.0, 1.0))
    figures.append(Figure("Cosine over time", drawn, legend=tuple(legend)))
    for prefix, title in (
        ("balance/weight/", "Weights of the tasks"),
        ("balance/gradient_norm/", "Norms of their gradients"),
    ):
        series, legend = [], []
        for number, name in enumerate(list(record.tasks)[:6]):
            x, y = record.metric_values("balance", f"{prefix}{name}")
            if x:
                series.append(Series(name, x, y, f"s{number}", dots=len(x) < 8))
                legend.append((f"s{number}", name))
        figures.append(Figure(title, svg.lines(series, title, "epoch"), legend=tuple(legend)))
    return [figure for figure in figures if figure.svg], sentences


def labels_of(record: RunRecord) -> Listing:
    """How many labels of each task each split has, and how many are missing."""
    sources = record.facts.sources
    totals = {split: sum(source.num_samples for source in group) for split, group in sources.items()}
    splits = list(totals)
    rows = []
    for name, task in record.tasks.items():
        row = [name, task.info.kind.rpartition(".")[2]]
        for split in splits:
            if split == "train":
                labels: float = task.info.num_labelled
            elif split in record.metrics:
                labels = record.metrics[split].get(name, {}).get("num_samples", 0.0)
            else:
                row.append(f"{totals[split]:,} samples, not evaluated")
                continue
            missing = totals[split] - labels
            share = f", {missing / totals[split]:.0%} missing" if missing > 0 and totals[split] else ""
            row.append(f"{labels:,.0f} of {totals[split]:,}{share}")
        rows.append(tuple(printable(cell) for cell in row))
    return Listing("Labels", ("task", "kind", *splits), rows)


def class_figures(record: RunRecord) -> list[Figure]:
    """How often each class occurs in the training labels."""
    figures = []
    for name, task in record.tasks.items():
        counts = task.info.class_counts
        if not counts or not sum(counts):
            continue
        order = sorted(range(len(counts)), key=lambda c: -counts[c])
        shown = order[:_BARS]
        rest = len(counts) - len(shown)
        caption = (
            f"{rest:,} classes with no more are not shown; the rarest has {min(counts):,}." if rest else ""
        )
        kind = kind_of(task.info.kind)
        what = "pixels" if kind.is_map else "labels"
        by = f"{what} by {kind.class_words[0]}"
        drawn = svg.counts(
            [task.info.classes[c] for c in shown],
            [counts[c] for c in shown],
            f"{what} of {name} by {kind.class_words[0]}",
        )
        figures.append(Figure(f"{printable(name)}: {by}", drawn, caption))
    return figures


def machine_figures(record: RunRecord) -> list[Figure]:
    """How fast it was, how long it waited for data, and the learning rate and gradient norm."""
    figures = []
    for name, title, caption in (
        ("images_per_s", "Images per second", "Over all processes."),
        ("data_wait", "Waiting for data", "The share of a step in which the device had nothing to do."),
        ("lr/backbone", "Learning rate", "Of the backbone."),
        ("grad_norm", "Norm of the gradient", "Before clipping."),
    ):
        x, y = record.metric_values("step", name)
        known = [value for value in y if value is not None]
        if len(known) > 1:
            top = max(known) * 1.05 or 1.0
            drawn = svg.lines([Series(title, x, y)], title, "epoch", y=(0.0, top))
            figures.append(Figure(title, drawn, caption))
    return figures


def environment_of(record: RunRecord) -> Listing:
    """What every start ran on; no host and no path."""
    starts = record.starts
    rows: list[tuple[str, ...]] = []
    for key, what in (
        ("started", "started"),
        ("device", "device"),
        ("ranks", "processes"),
        ("cpus", "CPU cores"),
        ("peak_memory_bytes", "most memory of a process"),
        ("python", "Python"),
        ("decoder", "image decoder"),
        ("git_commit", "git commit"),
    ):
        values = [start.get(key) for start in starts]
        if any(value is not None for value in values):
            rows.append((what, *(_environment_value(key, value) for value in values)))
    packages = dict.fromkeys(name for start in starts for name in start.get("packages", {}))
    rows += [(name, *(str(start.get("packages", {}).get(name, "")) for start in starts)) for name in packages]
    head = ("", *(f"start {number}" if len(starts) > 1 else "" for number in range(1, len(starts) + 1)))
    return Listing("Environment", head, rows)


def _environment_value(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == "peak_memory_bytes":
        return f"{value / 2**30:.2f} GiB"
    return printable(str(value))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without what they all begin with.

    >>> short_names(["digits/a", "digits/b"]), short_names(["a/x", "b/x"])
    (['a', 'b'], ['a/x', 'b/x'])
    """
    parts = [name.split("/") for name in names]
    same = len({part[0] for part in parts}) == 1 and len({part[-1] for part in parts}) == len(names)
    return [
        "/".join(part[1:]) if same and len(part) > 1 else name
        for part, name in zip(parts, names, strict=True)
    ]
