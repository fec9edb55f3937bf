"""The command that compares ways to balance: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.commands.runs import NprocOfEach, Overrides, RecipeFile


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Train")(compare)


def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train everything with so many seeds.")] = 3,
    methods: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="What to compare with equal weights.")
    ] = "uncertainty,famo,cagrad",
    nproc: NprocOfEach = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="The folder of all runs, taken up again if it exists. Without it runs/NAME-compare.",
        ),
    ] = None,
) -> None:
    """Train single-task models, equal weights and methods of balancing, and say which is better.

    All with the same data, model, epochs and seeds, one after the other. Prints mean and spread of every
    metric, how much worse than single-task models each way is (delta_m, in three conventions), and time and
    memory in parts of those with equal weights; writes them as comparison.json, comparison.png and
    conflicts.png. A method may have options: cagrad:c=0.5:level=features. Ctrl-C saves; the same command goes
    on from there.

    \b
      mtl compare configs/digits.yaml
      mtl compare configs/digits.yaml --seeds 5 --methods cagrad,nash train.epochs=5
      mtl compare configs/digits.yaml --methods mgda,mgda:level=features --nproc 2
    """
    from rich.console import Console

    from mtl_dist.report.compare import compare as run_comparison
    from mtl_dist.report.compare_plan import plan_comparison

    names = [name.strip() for name in methods.split(",") if name.strip()]
    plan = plan_comparison(recipe, overrides or [], names, seeds)
    code = run_comparison(plan, out or Path("runs") / f"{recipe.stem}-compare", nproc, Console())
    if code:
        raise typer.Exit(code)
