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
from mtl_dist.run_folder import RunFolder
from mtl_dist.specs import TaskInfo
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
    folder.write_metrics(split, evaluation.tasks)
    if evaluation.baselines:
        folder.write_baselines(
            split, {task: (found.name, found.metrics) for task, found in evaluation.baselines.items()}
        )
    for task, matrix in evaluation.confusion.items():
        stem = folder.evaluation / f"{split}_{task}_confusion"
        classes = task_infos[task].classes
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, matrix.astype(int).tolist(), strict=True))
        write_text(stem.with_suffix(".csv"), text.getvalue())
        try:
            draw_confusion(matrix, classes, f"{task} ({split})", stem.with_suffix(".png"))
        except Exception as error:  # whatever the disk or matplotlib raises
            say(f"warning  {stem.name}.png cannot be drawn: {type(error).__name__}: {error}")


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


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return str(int(value)) if name == "num_samples" else f"{value:.4f}"


def print_results(evaluations: Mapping[str, Evaluation], console: Console | None = None) -> None:
    (console or plain_console()).print(results_table(evaluations))
