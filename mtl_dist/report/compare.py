"""`mtl compare`: the same training, balanced in several ways, beside single-task models.

    DIR/<contender>/seed-<n>.yaml     the recipe of one run
    DIR/<contender>/seed-<n>/         its run folder, as `mtl train` leaves it
    DIR/<contender>/seed-<n>.txt      what it said
    DIR/comparison.json  comparison.png  conflicts.png

Every run is a process (or several) of its own, one after the other: the first seed of every contender, then
the second, so that mistakes show early. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mtl_dist.errors import UserError
from mtl_dist.figures.conflicts import Conflicts, conflicts_in
from mtl_dist.launch.series import Training, train_all
from mtl_dist.printable import printable
from mtl_dist.report.compare_metrics import (
    CONTROL,
    CONVENTIONS,
    SINGLE,
    Compared,
    Comparison,
    Metrics,
    Row,
    Spread,
    delta_m,
    means,
    spreads,
)
from mtl_dist.report.compare_plan import Contender, Plan
from mtl_dist.report.compare_show import show, write
from mtl_dist.run_folder import RunFolder
from mtl_dist.status import read_status
from mtl_dist.tracking.files import read_rows


@dataclass(frozen=True, eq=False)
class Run(Training):
    """One training: what it is for."""

    contender: Contender
    seed: int

    @property
    def num_images(self) -> int:
        """The samples that it has trained on."""
        status = read_status(self.directory)
        return status.position if status is not None else 0

    @property
    def evaluation(self) -> dict[str, dict[str, dict[str, float | None]]]:
        return RunFolder(self.directory).read_metrics()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of its metrics.jsonl."""
        return read_rows(self.directory)

    @property
    def seconds_per_image(self) -> float:
        """Of the training steps, over all ranks; NaN where too few were logged.

        The first logged row is left out: it holds what happens once.
        """
        rates = [row["images_per_s"] for row in self.rows if row["kind"] == "step"][1:]
        return statistics.fmean(1 / rate for rate in rates) if rates else math.nan

    @property
    def peak_memory(self) -> float:
        starts = RunFolder(self.directory).starts()
        return max(
            (start["peak_memory_bytes"] for start in starts if "peak_memory_bytes" in start), default=math.nan
        )


def compare(plan: Plan, directory: Path, nproc: int | None, console: Console) -> int:
    """Train what is missing, show the comparison; 0, or 128 + n where signal n ended it.

    Raises:
        UserError: the folder holds a comparison of other recipes, or a run refused to start.
    """
    runs = [
        Run(directory / contender.folder / f"seed-{seed}", contender, seed)
        for seed in plan.seeds
        for contender in plan.contenders
    ]
    for run in runs:
        run.write_recipe(
            run.contender.of_seed(run.seed),
            "Give the values of before, or another --out for another comparison.",
        )
    for note in plan.notes:
        console.print(printable(note), markup=False, highlight=False)
    code = _train(runs, nproc, console)
    if code:
        console.print("Stopped; the same command goes on from here.")
        return code
    comparison = comparison_of(plan, runs)
    write(comparison, directory)
    show(comparison, console)
    for note in comparison.notes[len(plan.notes) :]:
        console.print(printable(note), markup=False, highlight=False)
    console.print(printable(f"All of it is in {directory}."), markup=False, highlight=False, soft_wrap=True)
    return 0


def _train(runs: Sequence[Run], nproc: int | None, console: Console) -> int:
    """Train what is missing, one after the other; 0, or 128 + n after signal n."""
    names = {run: f"{run.contender.name}, seed {run.seed}" for run in runs}

    def started(run: Run) -> None:
        what = f"{runs.index(run) + 1}/{len(runs)}  {names[run]}"
        console.print(printable(f"{what}: {run.directory}"), markup=False, highlight=False, soft_wrap=True)

    def ended(run: Run, code: int) -> None:
        if run.failure:
            console.print(
                printable(f"{names[run]} failed: {run.failure}"),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        elif not run.is_done and code < 128:
            raise UserError(f"{names[run]}: {run.last_words(code)}")

    return train_all(runs, nproc, 1, started, ended)


# ---------------------------------------------------------------- what came of it
def comparison_of(plan: Plan, runs: Sequence[Run]) -> Comparison:
    """The metrics of the runs that came to an end.

    Raises:
        UserError: the data has neither a test nor a val split, or no single-task model of a task is there.
    """
    compared = {name: task.compared_modes() for name, task in plan.tasks.items()}
    done = [run for run in runs if run.is_done]
    split, metrics = _metrics_of(done)
    single: dict[str, dict[str, Spread]] = {}
    for task, modes in compared.items():
        own = [metrics[run] for run in done if run.contender.single == task]
        if not own:
            raise UserError(
                f"task {task}: expected a single-task model to compare with, found none finished."
            )
        single |= spreads(own, {task: modes})
    rows = [_single_row(done, single, plan.seeds)]
    conflicts: dict[str, Conflicts] = {}
    for contender in plan.contenders:
        mine = [run for run in done if run.contender == contender]
        if contender.single is None and mine:
            rows.append(_row(contender.name, mine, [metrics[run] for run in mine], means(single), compared))
            found = conflicts_in(row for run in mine for row in run.rows)
            if found is not None:
                conflicts[contender.name] = found
    if not any(row.name == CONTROL for row in rows):
        raise UserError(f"{CONTROL}: expected the control to finish with some seed, found that it did not.")
    failures = {f"{run.contender.name}, seed {run.seed}": run.failure for run in runs if run.failure}
    notes = (*plan.notes, *_shorter_runs(done, plan.seeds[0]))
    return Comparison(compared, split, plan.seeds, rows, conflicts, failures, notes)


def _shorter_runs(runs: Sequence[Run], seed: int) -> list[str]:
    """Which single-task models have seen fewer samples than the others, and why."""
    of_seed = [run for run in runs if run.seed == seed]
    most = max((run.num_images for run in of_seed), default=0)
    return [
        f"{run.contender.name}: trained on {run.num_images:,} samples, where others see {most:,}: "
        "the datasets without its labels are left out."
        for run in of_seed
        if run.contender.single and run.num_images < most
    ]


def _metrics_of(runs: Sequence[Run]) -> tuple[str, dict[Run, dict[str, dict[str, float]]]]:
    """The split to compare on, and the metrics of each run there; NaN where one is undefined."""
    evaluations = {run: run.evaluation for run in runs}
    split = next((name for name in ("test", "val") if all(name in e for e in evaluations.values())), None)
    if split is None:
        raise UserError("data: expected a test or a val split to compare on, found neither.")
    return split, {
        run: {
            task: {name: math.nan if value is None else value for name, value in values.items()}
            for task, values in evaluation[split].items()
        }
        for run, evaluation in evaluations.items()
    }


def _row(
    name: str,
    runs: Sequence[Run],
    metrics: Sequence[Metrics],
    base: Metrics,
    compared: Compared,
) -> Row:
    deltas = [delta_m(found, base, compared) for found in metrics]
    return Row(
        name=name,
        num_runs=len(runs),
        metrics=spreads(metrics, compared),
        delta_m={how: Spread(tuple(delta[how] for delta in deltas)) for how in CONVENTIONS},
        seconds_per_image=Spread(tuple(run.seconds_per_image for run in runs)),
        peak_memory=Spread(tuple(run.peak_memory for run in runs)),
    )


def _single_row(
    runs: Sequence[Run], metrics: Mapping[str, Mapping[str, Spread]], seeds: Sequence[int]
) -> Row:
    """The single-task models as one: all of them together cost what they cost one after the other.

    Their time is that per image of a training of all data, of which each may see its own datasets alone.
    """
    most = max(run.num_images for run in runs)
    by_seed = [[run for run in runs if run.contender.single and run.seed == seed] for seed in seeds]
    complete = [own for own in by_seed if len(own) == len(metrics)]
    return Row(
        name=SINGLE,
        num_runs=len(complete),
        metrics=metrics,
        delta_m={},
        seconds_per_image=Spread(
            tuple(sum(run.seconds_per_image * run.num_images / most for run in own) for own in complete)
        ),
        peak_memory=Spread(tuple(max(run.peak_memory for run in own) for own in complete)),
    )
