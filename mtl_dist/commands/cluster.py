"""The commands about jobs: submit, status, logs, cancel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mtl_dist.commands.runs import DataMoved, Overrides, RunDir, RunFolder, StartFrom, Tags
from mtl_dist.errors import UserError
from mtl_dist.plural import readable
from mtl_dist.printable import printable, printable_lines, say

if TYPE_CHECKING:
    from mtl_dist.cell_table import CellTable
    from mtl_dist.launch.jobs import RunView

RUNS = Path("runs")

RECENT_S = 24 * 3600
"""`mtl status` without --all leaves out what ended before."""


def add_to(app: typer.Typer) -> None:
    for command in (submit, status, logs, cancel):
        app.command(rich_help_panel="Cluster and jobs")(command)


def submit(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", show_default=False, help="A recipe, or the folder of a run that is to go on."
        ),
    ],
    cluster: Annotated[
        Path, typer.Option(metavar="FILE", show_default=False, help="A cluster profile: slurm/general.yaml.")
    ],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    tasks_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each node: one per GPU.")] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A.B=1,2,3", show_default=False, help="One run per value; several sweeps are multiplied."
        ),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Runs of a sweep at once, at most.")
    ] = None,
    then: Annotated[
        Literal["evaluate"] | None,
        typer.Option(show_default=False, help="A job that starts when the training is done."),
    ] = None,
    run_dir: RunDir = None,
    tag: Tags = None,
    start_from: StartFrom = None,
    data_moved: DataMoved = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")
    ] = False,
) -> None:
    """Train a recipe on a Slurm cluster.

    Code and recipe are copied into the run folder first: later edits do not change a queued job. The job is
    requeued after a preemption, its time limit, a lost node or a crash, and goes on where it was.

    \b
      mtl submit configs/skin.yaml --cluster slurm/general.yaml --nodes 2 --tasks-per-node 4
      mtl submit configs/skin.yaml --cluster slurm/general.yaml optim.lr=3e-4 --then evaluate
      mtl submit configs/skin.yaml --cluster slurm/general.yaml --sweep optim.lr=1e-3,3e-4 --parallel 4
      mtl submit runs/skin/ID --cluster slurm/general.yaml --nodes 1    go on, here on fewer ranks
    """
    from mtl_dist.launch.script import Shape
    from mtl_dist.launch.slurm import submit as submit_recipe

    submitted = submit_recipe(
        recipe,
        cluster,
        Shape(nodes, tasks_per_node),
        overrides=overrides or [],
        sweeps=sweep or [],
        parallel=parallel,
        then=then,
        run_dir=run_dir,
        tags=tag or [],
        start_from=start_from,
        data_moved=data_moved,
        dry_run=dry_run,
    )
    if dry_run:
        say(submitted.script)
        return
    for run, job in zip(submitted.runs, submitted.job_ids, strict=True):
        say(f"job {job}  {run}")
    say(f"mtl status {_common(submitted.runs)}")


def status(
    run: Annotated[
        Path, typer.Argument(metavar="[RUN]", help="A run folder, a sweep's, or any folder of runs.")
    ] = RUNS,
    all_runs: Annotated[
        bool, typer.Option("--all", help="Also runs that ended more than a day ago.")
    ] = False,
    tag: Tags = None,
) -> None:
    """Show where runs stand: on Slurm and on this machine.

    A run whose job ended with nobody left to requeue it is named, and submitted again where its profile
    allows that (requeue.resubmit).

    \b
      mtl status                  runs that are active, or ended today
      mtl status --all
      mtl status runs/skin/ID
      mtl status --tag thursday   those with this tag, also older ones
    """
    from rich.console import Console

    from mtl_dist.launch.jobs import ACTIVE, view_runs
    from mtl_dist.launch.look import after_look

    views = view_runs(with_tags(some_runs(run), tag or []))
    if run == RUNS and not all_runs and not tag:
        recent = time.time() - RECENT_S
        views = [v for v in views if v.state in ACTIVE or v.updated > recent]
    views = [after_look(view) for view in views]
    console = Console()
    console.print(status_table(views, run))
    for view in views:
        if note := _note(view):
            console.print(
                printable(f"{_name(view, run)}: {note}"), markup=False, highlight=False, soft_wrap=True
            )


def some_runs(folder: Path) -> list[Path]:
    """The run folders at or below `folder`, of which there must be one."""
    from mtl_dist.launch.jobs import find_runs

    runs = find_runs(folder)
    if not runs:
        raise UserError(f"{folder}: expected a run folder or a folder of runs, found none.")
    return runs


def with_tags(runs: Sequence[Path], tags: Sequence[str]) -> list[Path]:
    """Those of the runs that have all of the tags.

    Raises:
        UserError: none has.
    """
    if not tags:
        return list(runs)
    from mtl_dist.run_folder import RunFolder  # NumPy, for which `mtl status` need not wait

    tags_of = {run: RunFolder(run).read_tags() for run in runs}
    found = [run for run, own in tags_of.items() if set(tags) <= set(own)]
    if not found:
        known = sorted({tag for own in tags_of.values() for tag in own})
        raise UserError(
            f"--tag: expected runs with {' and '.join(tags)}, found none of {len(runs)}. "
            f"Their tags: {', '.join(known) or 'none'}."
        )
    return found


def status_table(views: Sequence[RunView], below: Path) -> CellTable:
    """One row per run; names are relative to `below`."""
    from mtl_dist.cell_table import CellTable

    table = CellTable(box=None, pad_edge=False)
    for column in ("run", "job", "state"):
        table.add_column(column, overflow="fold")
    for column in ("step", "epoch", "images/s", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("best", overflow="fold")
    for view in views:
        table.add_row(_name(view, below), view.job, view.state, *_progress(view))
    return table


def _name(view: RunView, below: Path) -> str:
    return view.run.name if view.run == below else str(view.run.relative_to(below))


def _progress(view: RunView) -> tuple[str, str, str, str, str]:
    """Step, epoch, images/s, time left and best metric; the speed only of a run that runs."""
    now = view.status
    if now is None:
        return ("", "", "", "", "")
    runs = view.state == "running"
    left = now.seconds_left
    return (
        f"{now.step}/{now.total_steps}" if now.total_steps else str(now.step),
        f"{now.epoch:.2f}",
        f"{now.images_per_s:.0f}" if runs else "",
        _duration(left) if runs and left is not None else "",
        f"{now.metric} {readable(now.best)}" if now.best is not None else "",
    )


def _note(view: RunView) -> str:
    """What does not fit into the table: how often it was requeued, and why it is where it is."""
    parts = []
    if view.requeues:
        causes = ", ".join(f"{count} x {cause}" for cause, count in view.requeues.items())
        parts.append(f"requeued {sum(view.requeues.values())} times ({causes})")
    return "; ".join([*parts, view.detail] if view.detail else parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _common(runs: Sequence[Path]) -> Path:
    return runs[0] if len(runs) == 1 else runs[0].parent


def logs(
    run: RunFolder,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=0, show_default=False, help="A rank of a run on a cluster; 0 without it."),
    ] = None,
) -> None:
    """Print what a run has printed.

    \b
      mtl logs runs/skin/ID -f
      mtl logs runs/skin/ID --rank 3
    """
    from mtl_dist.launch.jobs import follow as follow_file
    from mtl_dist.launch.jobs import has_ended, log_path

    for text in follow_file(log_path(run, rank), lambda: not follow or has_ended(run)):
        print(printable_lines(text), end="", flush=True)


def cancel(run: RunFolder) -> None:
    """End a run, or all of a sweep's; each saves first.

    \b
      mtl cancel runs/skin/ID
    """
    from mtl_dist.launch.jobs import ACTIVE, view_runs
    from mtl_dist.launch.jobs import cancel as cancel_run

    views = view_runs(some_runs(run))
    active = [view for view in views if view.state in ACTIVE]
    if not active:
        raise UserError(f"{run}: expected a run that waits or runs, found none. See mtl status {run}.")
    for view in active:
        say(f"{view.run}: {cancel_run(view.run)}")
