"""`mtl compare`: the same training, balanced in several ways, beside single-task models.

    DIR/<contender>/seed-<n>.yaml     the recipe of one run
    DIR/<contender>/seed-<n>/         its run folder, as `mtl train` leaves it
    DIR/<contender>/seed-<n>.txt      what it said
    DIR/comparison.json  comparison.png  conflicts.png

Every run is a process (or several) of its own, one after the other: the first seed of every contender, then
the second, so that mistakes show early. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mtl_dist.config.loading import to_yaml
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.figures.conflicts import Conflicts, conflicts_in
from mtl_dist.launch.local import Launch, plan_launch, supervise
from mtl_dist.recipe import load_recipe
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

USER_ERROR = 2


@dataclass(frozen=True, eq=False)
class Run:
    """One training: where it is, and what came of it."""

    contender: Contender
    seed: int
    directory: Path

    @property
    def recipe_path(self) -> Path:
        return self.directory.with_suffix(".yaml")

    @property
    def is_done(self) -> bool:
        status = read_status(self.directory)
        return status is not None and status.state == "done"

    @property
    def failure(self) -> str:
        """Why it has no result: its loss was not finite, for example."""
        status = read_status(self.directory)
        return status.reason if status is not None and status.state == "failed" else ""

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
        starts = json.loads((self.directory / "environment.json").read_text(encoding="utf-8"))
        return max(
            (start["peak_memory_bytes"] for start in starts if "peak_memory_bytes" in start), default=math.nan
        )


def compare(plan: Plan, directory: Path, nproc: int | None, console: Console) -> int:
    """Train what is missing, show the comparison; 0, or 128 + n where signal n ended it.

    Raises:
        UserError: the folder holds a comparison of other recipes, or a run refused to start.
    """
    runs = [
        Run(contender, seed, directory / contender.folder / f"seed-{seed}")
        for seed in plan.seeds
        for contender in plan.contenders
    ]
    for run in runs:
        _refuse_other_recipe(run)
    for note in plan.notes:
        console.print(note, markup=False, highlight=False)
    for number, run in enumerate(runs, start=1):
        if run.is_done:
            continue
        what = f"{number}/{len(runs)}  {run.contender.name}, seed {run.seed}"
        console.print(f"{what}: {run.directory}", markup=False, highlight=False, soft_wrap=True)
        code = _train(run, nproc)
        if code > 128:
            console.print("Stopped; the same command goes on from here.")
            return code
        if run.failure:
            console.print(f"{what} failed: {run.failure}", markup=False, highlight=False, soft_wrap=True)
        elif not run.is_done:
            raise UserError(f"{run.contender.name}, seed {run.seed}: {_last_words(run, code)}")
    comparison = comparison_of(plan, runs)
    write(comparison, directory)
    show(comparison, console)
    for note in comparison.notes[len(plan.notes) :]:
        console.print(note, markup=False, highlight=False)
    console.print(f"All of it is in {directory}.", markup=False, highlight=False, soft_wrap=True)
    return 0


def _refuse_other_recipe(run: Run) -> None:
    """Write down the run's recipe; refuse one other than that of its first start."""
    text = to_yaml(run.contender.of_seed(run.seed))
    if not run.recipe_path.is_file():
        run.recipe_path.parent.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe_path, text)
        return
    before, after = load_recipe(run.recipe_path), run.contender.of_seed(run.seed)
    for section in type(before).model_fields:
        old, new = getattr(before, section), getattr(after, section)
        if old != new:
            raise UserError(
                f"{section}: expected the same as in {run.recipe_path}, found another value. "
                "Give the values of before, or another --out for another comparison."
            )


def _train(run: Run, nproc: int | None) -> int:
    """One training in processes of its own; its exit code, or 128 + n after signal n."""
    arguments = ["train", str(run.recipe_path), "--run-dir", str(run.directory)]
    launch = plan_launch(arguments, nproc, None, torch.cuda.device_count())
    if launch is None:
        command = (sys.executable, "-m", "mtl_dist", *arguments)
        launch = Launch(command, 1, len(os.sched_getaffinity(0)))
    with open(run.directory.with_suffix(".txt"), "ab") as output:
        return supervise(launch, output)


def _last_words(run: Run, code: int) -> str:
    """The last line that a run said before it ended with `code`."""
    said = run.directory.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for line in said if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    where = "" if code == USER_ERROR else f" (exit code {code}; see {run.directory.with_suffix('.txt')})"
    return last + where


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
