"""The commands about many runs: sweep, runs, tag."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.commands.cluster import RUNS, some_runs, with_tags
from mtl_dist.commands.runs import NprocOfEach, Overrides, RecipeFile, RunFolder, Tags
from mtl_dist.errors import UserError
from mtl_dist.printable import say


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Train")(sweep)
    app.command(rich_help_panel="Use a run")(runs)
    app.command(rich_help_panel="Use a run")(tag)


def sweep(
    recipe: RecipeFile,
    overrides: Overrides = None,
    parallel: Annotated[int, typer.Option(min=1, metavar="N", help="Trainings at once.")] = 1,
    nproc: NprocOfEach = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            show_default=False,
            help="What ranks the runs, such as test/digit/accuracy; without it the monitored metric.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="The folder of all runs, taken up again if it exists. Without it runs/NAME-sweep.",
        ),
    ] = None,
    tag: Tags = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every recipe, print the runs and train nothing.")
    ] = False,
) -> None:
    """Train a recipe once for each combination of values, on this machine, and say which is best.

    A value with commas is swept; brackets and quotes keep commas. Prints a table, best first, and writes
    sweep.json and sweep.png. Ctrl-C saves; the same command goes on from there, and more values add runs. On
    a cluster: mtl submit --sweep, with the same values.

    \b
      mtl sweep configs/digits.yaml optim.lr=1e-3,3e-3 balance.method=equal,famo
      mtl sweep configs/digits.yaml optim.lr=1e-3,3e-3 train.seed=0,1,2 --parallel 2 --tag lr
      mtl sweep configs/digits.yaml model.head.hidden=[],[64],[64,64] train.epochs=5 --by test/digit/accuracy
    """
    from rich.console import Console

    from mtl_dist.report.sweep import plan_sweep, run_sweep
    from mtl_dist.run_folder import checked_tags

    directory = out or Path("runs") / f"{recipe.stem}-sweep"
    plan = plan_sweep(recipe, overrides or [], directory)
    tags = checked_tags(tag or [])
    if dry_run:
        for point in plan.points:
            say(str(point.directory))
        return
    code = run_sweep(plan, directory, Console(), nproc=nproc, parallel=parallel, by=by, tags=tags)
    if code:
        raise typer.Exit(code)


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Run folders, or folders of runs; runs/ without one."),
    ] = None,
    tag: Tags = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            show_default=False,
            help="Best first by it: val/loss, test/digit/f1, ...",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="KEY,KEY,...",
            show_default=False,
            help="Settings and metrics to show: optim.lr, ...",
        ),
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--compare", help="Side by side: the settings that differ, and every metric.")
    ] = False,
    best: Annotated[
        str | None,
        typer.Option(metavar="METRIC", show_default=False, help="Print the path of the best run alone."),
    ] = None,
) -> None:
    """List runs with what they reached, compare them, find the best.

    \b
      mtl runs
      mtl runs runs/digits --by test/digit/accuracy --columns optim.lr,train.seed
      mtl runs runs/digits/A runs/digits/B --compare
      mtl runs --tag thursday
      mtl evaluate $(mtl runs --best val/loss)
    """
    from rich.console import Console

    from mtl_dist.commands.options import words
    from mtl_dist.report.run_list import comparison_of, list_runs, sorted_by, table_of, wide

    given = folders or [RUNS]
    found = list(dict.fromkeys(run for folder in given for run in some_runs(folder)))
    listed = list_runs(with_tags(found, tag or []))
    for run in listed:
        if run.problem:
            say(f"warning: {run.problem}", sys.stderr)
    if best is not None:
        say(str(sorted_by(best, listed)[0].path))
        return
    if by is not None:
        listed = sorted_by(by, listed)
    console = wide(Console())
    if side_by_side:
        if len(listed) < 2:
            raise UserError(f"--compare: expected at least two runs, found {len(listed)}.")
        console.print(comparison_of(listed))
        return
    below = given[0] if len(given) == 1 else Path()
    console.print(table_of(listed, below, by, words("--columns", columns) if columns else []))


def tag(
    run: RunFolder,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]...", show_default=False, help="Tags to add.")
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", show_default=False, help="A tag to take away; several are allowed."),
    ] = None,
) -> None:
    """Tag a run, or all below a folder, and print the tags.

    \b
      mtl tag runs/digits/ID good for-the-paper
      mtl tag runs/digits/ID --remove good
    """
    from mtl_dist.run_folder import RunFolder

    for path in some_runs(run):
        say(f"{path}: {' '.join(RunFolder(path).change_tags(tags or [], remove or [])) or '(no tags)'}")
