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
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Look at a cluster instead, by its profile: slurm/x.yaml.",
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes of the cluster to look at.")] = 2,
    tasks_per_node: Annotated[int, typer.Option(min=1, metavar="N", help="Ranks on each of them.")] = 1,
) -> None:
    """Look at this machine: versions, GPUs, memory, disks, the speed between processes, data/'s pixels.

    Prints what is well, what is not and what to do; exit code 1 if something fails. With --cluster the same
    is a short job, and every node speaks for itself.

    \b
      mtl doctor
      mtl doctor --cluster slurm/x.yaml --nodes 2
    """
    from mtl_dist.report.doctor import run_doctor

    raise typer.Exit(run_doctor(cluster, nodes=nodes, tasks_per_node=tasks_per_node))
