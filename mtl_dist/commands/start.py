"""The command before all others: init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Start")(init)


def init(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", show_default=False, help="A recipe, preset or profile to copy."),
    ] = None,
    out: Annotated[
        Path, typer.Argument(metavar="[OUT]", show_default=False, help="Where to: a new file, or a folder.")
    ] = Path(),
) -> None:
    """List the recipes, presets and profiles that come with the package, or copy one.

    \b
      mtl init                        the list
      mtl init skin                   writes skin.yaml here, to be changed
      mtl init general slurm/         a cluster profile
    """
    from mtl_dist.shipped import SHELVES, copy_of, headline

    if name is not None:
        print(f"{copy_of(name, out)}: written; its first lines say how to run it")
        return
    for shelf in SHELVES:
        print(f"{shelf.title}:")
        files = shelf.files()
        width = max(map(len, files), default=0)
        for file, path in files.items():
            print(f"  {file:<{width}}  {headline(path)}")
        print()
    print("mtl init NAME copies one.")
