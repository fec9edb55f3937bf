"""The command that makes a page of a run: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.printable import say


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Use a run")(report)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="A run folder, or several for side by side; a folder of runs, such as a sweep's, for all.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="The page; without it report.html in the run folder, of several in the working directory.",
        ),
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option("--pictures/--no-pictures", help="Show samples of the data, with the model's answers."),
    ] = True,
) -> None:
    """Write a page of a run: one HTML file with numbers, charts and pictures, to look at or to send.

    Results of each task against a constant answer, with intervals; curves; confusions; calibration; maps
    best and worst; mistakes; conflicts of tasks; data, machine and recipe. Nothing in it is loaded from
    elsewhere, and no path of this machine is in it; samples are, unless --no-pictures. Of several runs it
    says first what differs in their recipes.

    \b
      mtl report runs/digits/ID
      mtl report runs/digits/ID runs/digits/OTHER --out compared.html
      mtl report runs/digits-sweep --out sweep.html
    """
    from mtl_dist.report.page.write import write_report

    path = write_report(runs, out, pictures)
    say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
