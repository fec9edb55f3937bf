"""A comparison as a table on the terminal, as JSON and as pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mtl_dist.cell_table import CellTable
from mtl_dist.durable import write_text
from mtl_dist.figures.conflicts import draw_conflicts
from mtl_dist.figures.seeds import draw_seeds
from mtl_dist.printable import printable
from mtl_dist.report.compare_metrics import CONVENTIONS, Comparison, Row, Spread

WIDTH_OF_LABELS, WIDTH_OF_A_COLUMN = 60, 22


# ---------------------------------------------------------------- terminal
def show(comparison: Comparison, console: Console) -> None:
    """Print one column per way to train, one row per metric, and which tasks conflict."""
    if not console.is_terminal:
        # A file or a pipe has no width: nothing is cut off there.
        needed = WIDTH_OF_LABELS + WIDTH_OF_A_COLUMN * len(comparison.rows)
        console = Console(file=console.file, width=max(console.width, needed))
    console.print(table_of(comparison))
    console.print(
        "* main metric of its task. delta_m: mean per cent by which metrics are worse than those of the "
        "single-task models (negative: better), averaged as the row says. Mean ± standard deviation over "
        "seeds; time per image and peak memory in parts of those with equal weights.",
        highlight=False,
    )
    for name, conflicts in comparison.conflicts.items():
        for sentence in conflicts.sentences():
            console.print(printable(f"{name}: {sentence}"), markup=False, highlight=False)
    for run, reason in comparison.failures.items():
        console.print(printable(f"{run} has no result: {reason}"), markup=False, highlight=False)


def table_of(comparison: Comparison) -> CellTable:
    seeds = len(comparison.seeds)
    table = CellTable(
        title=f"{comparison.split} split, {seeds} seed{'s' if seeds > 1 else ''}", pad_edge=False
    )
    table.add_column("task")
    table.add_column("metric")
    for row in comparison.rows:
        table.add_column(row.name, justify="right", overflow="fold")
    for task, modes in comparison.compared.items():
        for number, metric in enumerate(modes):
            cells = [spread_text(row.metrics[task][metric], 4) for row in comparison.rows]
            last = number == len(modes) - 1
            label = metric if number else f"{metric} *"
            table.add_row("" if number else task, label, *cells, end_section=last)
    for how in CONVENTIONS:
        cells = [spread_text(row.delta_m[how], 2) if row.delta_m else "" for row in comparison.rows]
        table.add_row("", f"delta_m over {how}, %", *cells, end_section=how == CONVENTIONS[-1])
    for label, values in (
        ("time", [comparison.time_ratio(row) for row in comparison.rows]),
        ("memory", [comparison.memory_ratio(row) for row in comparison.rows]),
    ):
        table.add_row("", label, *("-" if math.isnan(value) else f"{value:z.2f}" for value in values))
    table.add_row("", "runs", *(str(row.num_runs) for row in comparison.rows))
    return table


def spread_text(spread: Spread, digits: int) -> str:
    if math.isnan(spread.mean):
        return "-"
    deviation = "" if math.isnan(spread.deviation) else f" ±{spread.deviation:.{digits}f}"
    return f"{spread.mean:.{digits}f}{deviation}"


# ---------------------------------------------------------------- files
def write(comparison: Comparison, directory: Path) -> None:
    """Write comparison.json, comparison.png, and conflicts.png where gradients were compared."""
    write_text(directory / "comparison.json", json.dumps(to_json(comparison), indent=1))
    draw(comparison, directory / "comparison.png")
    if comparison.conflicts:
        draw_conflicts(comparison.conflicts, directory / "conflicts.png")


def to_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "split": comparison.split,
        "seeds": list(comparison.seeds),
        "main_metrics": {task: next(iter(modes)) for task, modes in comparison.compared.items()},
        "notes": list(comparison.notes),
        "failures": dict(comparison.failures),
        "contenders": {row.name: _row_json(comparison, row) for row in comparison.rows},
        "conflicts": {
            name: {
                "tasks": found.tasks,
                "mean_cosines": [_numbers(line) for line in found.cosines_TT.tolist()],
            }
            for name, found in comparison.conflicts.items()
        },
    }


def _row_json(comparison: Comparison, row: Row) -> dict[str, Any]:
    return {
        "num_runs": row.num_runs,
        "metrics": {task: _spreads_json(own) for task, own in row.metrics.items()},
        "delta_m_percent": {f"over {how}": _spread_json(spread) for how, spread in row.delta_m.items()},
        "seconds_per_image": _spread_json(row.seconds_per_image),
        "peak_memory_bytes": _spread_json(row.peak_memory),
        "time_ratio_to_equal": _number(comparison.time_ratio(row)),
        "memory_ratio_to_equal": _number(comparison.memory_ratio(row)),
    }


def _spreads_json(spreads: Mapping[str, Spread]) -> dict[str, Any]:
    return {name: _spread_json(spread) for name, spread in spreads.items()}


def _spread_json(spread: Spread) -> dict[str, Any]:
    return {
        "mean": _number(spread.mean),
        "deviation": _number(spread.deviation),
        "values": _numbers(list(spread.values)),
    }


def _numbers(values: list[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the main metric of each task and delta_m over tasks: every seed, mean and standard deviation."""
    panels: dict[str, list[Spread]] = {}
    for task, modes in comparison.compared.items():
        main = next(iter(modes))
        panels[f"{task} {main}"] = [row.metrics[task][main] for row in comparison.rows]
    panels["delta_m over tasks, %"] = [row.delta_m.get("tasks", Spread((0.0,))) for row in comparison.rows]
    values = {title: [spread.values for spread in spreads] for title, spreads in panels.items()}
    draw_seeds([row.name for row in comparison.rows], values, path)
