"""The commands about datasets: prepare, index, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.commands import prepare
from mtl_dist.printable import say


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Data")(inspect)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(rich_help_panel="Data", context_settings=passed_on)(index)
    app.add_typer(prepare.app, name="prepare", rich_help_panel="Data")


def inspect(
    dataset: Annotated[
        str,
        typer.Argument(metavar="DATASET", show_default=False, help="A prepared dataset's directory or URL."),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every shard with its hash and every index with its shards."),
    ] = False,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write a contact sheet here, as a PNG."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split whose samples are on the sheet.")] = "train",
) -> None:
    """Look into a dataset: counts per task and split, missing labels, sizes, pictures.

    Exit code 1 if --verify finds damage.

    \b
      mtl inspect data/digits
      mtl inspect data/digits --sheet digits.png
      mtl inspect data/digits --verify
    """
    from rich.console import Console

    from mtl_dist.data.inspect import inspect_dataset, render
    from mtl_dist.data.remote import location

    place = location(dataset)
    inspection = inspect_dataset(place, verify)
    Console().print(render(inspection))
    if inspection.problems:
        raise typer.Exit(1)
    if sheet is not None:
        from mtl_dist.data.contact_sheet import contact_sheet  # torch and matplotlib

        contact_sheet(place, split, sheet)
        say(f"{sheet}: samples of {split}")


def index(context: typer.Context) -> None:
    """Index WebDataset tars that others wrote: they stay where they are, and OUT says what is in them.

    \b
      mtl index 'in1k/train-{000..146}.tar' data/in1k --image jpg --classification label=cls
      mtl index laion/ data/laion --multilabel tags=json:tags --regression score=json:meta.score
    """
    command = prepare.command_of("tars")  # imported when it is asked for
    code = command.main(context.args, prog_name=context.command_path, standalone_mode=False)
    if code:
        raise typer.Exit(code)
