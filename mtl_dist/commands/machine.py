"""The command about the machine: doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Machine")(doctor)


def doctor(
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Look at a cluster instead: a profile such as slurm/x.yaml."),
    ] = None,
) -> None:
    """Look at this machine: versions, GPUs, memory, disks, the speed between processes.

    Prints a table of ok, warning and failure with what to do; exit code 1 if something fails.

    \b
      mtl doctor
    """
    from mtl_dist.report.doctor import run_doctor

    raise typer.Exit(run_doctor(cluster))
