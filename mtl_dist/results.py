"""Results: evaluation/ in the run folder, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping

from rich.console import Console

from mtl_dist.cell_table import CellTable
from mtl_dist.durable import write_text
from mtl_dist.evaluator import Evaluation
from mtl_dist.figures.confusion import draw_confusion
from mtl_dist.heartbeat import getting_on
from mtl_dist.intervals import Interval, intervals
from mtl_dist.plural import readable
from mtl_dist.printable import cell
from mtl_dist.run_folder import RunFolder
from mtl_dist.sample_rows import Table
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.task import Task
from mtl_dist.tracking.tracker import plain_console


def write_evaluation(
    folder: RunFolder,
    split: str,
    evaluation: Evaluation,
    task_infos: Mapping[str, TaskInfo],
    say: Callable[[str], None],
) -> None:
    """Write evaluation/metrics.json, baselines.json and, per classification task, the confusion matrix as CSV
    and picture.

    A picture is not worth an evaluation: one that cannot be drawn is reported to `say`.
    """
    folder.write_metrics(split, evaluation.tasks, evaluation.per_class)
    if evaluation.baselines:
        folder.write_baselines(
            split, {task: (found.name, found.metrics) for task, found in evaluation.baselines.items()}
        )
    for task, matrix in evaluation.confusion.items():
        stem = folder.evaluation / f"{split}_{task}_confusion"
        classes = task_infos[task].classes
        getting_on()
        text = io.StringIO()
        writer = csv.writer(text)
        names = [cell(name) for name in classes]
        writer.writerow(["true \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.astype(int).tolist(), strict=True))
        write_text(stem.with_suffix(".csv"), text.getvalue())
        try:
            draw_confusion(matrix, classes, f"{task} ({split})", stem.with_suffix(".png"))
        except Exception as error:  # whatever the disk or matplotlib raises
            say(f"warning  {stem.name}.png cannot be drawn: {type(error).__name__}: {error}")


def headlines(evaluation: Evaluation, tasks: Mapping[str, Task], table: Table | None) -> CellTable:
    """One row per task: its main metric, how sure that is, and what the constant answer reaches."""
    shown = CellTable(box=None, pad_edge=False)
    for column in ("task", "metric", "result", "95 %", "constant answer", ""):
        shown.add_column(column, no_wrap=column == "metric")  # a name is read as a whole, and copied
    for name, task in tasks.items():
        metric = task.settings.compared[0]
        value = evaluation.tasks.get(name, {}).get(metric, math.nan)
        if math.isnan(value):
            continue
        getting_on()
        found = None if table is None else intervals(task, table.of_task(name)).get(metric)
        between = f"{readable(found[0])} to {readable(found[1])}" if found else ""
        baseline = evaluation.baselines.get(name)
        reached = math.nan if baseline is None else baseline.metrics.get(metric, math.nan)
        constant = f"{baseline.name} {readable(reached)}" if baseline and not math.isnan(reached) else ""
        mode = task.settings.modes.get(metric)
        shown.add_row(name, metric, readable(value), between, constant, _against(value, found, reached, mode))
    return shown


def _against(value: float, found: Interval | None, reached: float, mode: str | None) -> str:
    """Whether it is better than the constant answer, which it is where the whole interval is."""
    if math.isnan(reached) or mode is None:
        return ""
    edge = value if found is None else found[0] if mode == "max" else found[1]
    return "better" if (edge > reached if mode == "max" else edge < reached) else "not better"


def results_table(evaluations: Mapping[str, Evaluation]) -> CellTable:
    """One row per task and metric, one column per split."""
    table = CellTable(box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    for split in evaluations:
        table.add_column(split, justify="right")
    tasks = dict.fromkeys(task for evaluation in evaluations.values() for task in evaluation.tasks)
    for task in tasks:
        rows = [evaluation.tasks.get(task, {}) for evaluation in evaluations.values()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        for number, name in enumerate(names):
            values = [_shown(name, row.get(name, math.nan)) for row in rows]
            table.add_row(task if number == 0 else "", name, *values, end_section=name == names[-1])
    return table


def per_class_tables(evaluation: Evaluation) -> list[CellTable]:
    """A row for each class (or number, quantile, point) of a task: a table of all tasks that have the same
    metrics of these."""
    by_names: dict[tuple[str, ...], list[str]] = {}
    for task, parts in evaluation.per_class.items():
        found = dict.fromkeys(name for values in parts.values() for name in values)
        by_names.setdefault(tuple(sorted(found, key=lambda name: name == "support")), []).append(task)
    tables = []
    for names, tasks in by_names.items():
        table = CellTable(box=None, pad_edge=False)
        table.add_column("task")
        table.add_column("class or part")
        for name in names:
            table.add_column(name, justify="right")
        for task in tasks:
            for number, (label, values) in enumerate(evaluation.per_class[task].items()):
                cells = [_shown(name, values[name]) if name in values else "" for name in names]
                table.add_row(task if number == 0 else "", label, *cells)
        tables.append(table)
    return tables


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return str(int(value)) if name in ("num_samples", "support") else readable(value)


def print_results(evaluations: Mapping[str, Evaluation], console: Console | None = None) -> None:
    (console or plain_console()).print(results_table(evaluations))


def print_per_class(evaluation: Evaluation) -> None:
    tables = per_class_tables(evaluation)
    for table in tables:
        plain_console().print(table)
    if not tables:
        plain_console().print("No task of the run has classes or other parts.")


def calibration_table(evaluation: Evaluation) -> CellTable:
    """One row per task: its temperature, and what its probabilities are worth before and after."""
    table = CellTable(box=None, pad_edge=False)
    for column in ("task", "temperature", "", "ece", "nll", "brier"):
        table.add_column(column, justify="right" if column else "left")
    for task, found in evaluation.calibrated.items():
        for number, (when, values) in enumerate((("before", found.before), ("after", found.after))):
            first = (task, _shown("", found.temperature)) if number == 0 else ("", "")
            table.add_row(*first, when, *(_shown(name, value) for name, value in values.items()))
    return table


def print_calibration(split: str, evaluation: Evaluation) -> None:
    console = plain_console()
    console.print(f"Probabilities on {split} by temperature:")
    console.print(calibration_table(evaluation))
