"""The commands before all others: init, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.printable import say


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Start")(init)
    app.command(rich_help_panel="Start")(settings)


def init(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|DATASET]",
            show_default=False,
            help="A recipe, preset or profile to copy, or a prepared dataset to write a recipe for.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", show_default=False, help="Where to: a new file, or a folder."),
    ] = None,
) -> None:
    """List the recipes, presets and profiles that come with the package, copy one, or write a recipe.

    \b
      mtl init                        the list
      mtl init skin                   writes skin.yaml here, to be changed
      mtl init general slurm/         a cluster profile
      mtl init data/cats > mine.yaml  a recipe for this dataset, every choice with its reason
    """
    from mtl_dist.shipped import SHELVES, copy_of, headline

    if name is not None and (Path(name) / "dataset.json").is_file():
        _write_recipe(Path(name), out)
        return
    if name is not None:
        say(f"{copy_of(name, out or Path())}: written; its first lines say how to run it")
        return
    for shelf in SHELVES:
        say(f"{shelf.title}:")
        files = shelf.files()
        width = max(map(len, files), default=0)
        for file, path in files.items():
            say(f"  {file:<{width}}  {headline(path)}")
        say("")
    say("mtl init NAME copies one; mtl init DATASET writes one for your data.")


def settings(
    key: Annotated[
        str, typer.Argument(metavar="[KEY]", show_default=False, help="A place in a recipe: train, optim.lr.")
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/settings.md has it.")] = False,
) -> None:
    """Say what a recipe may state: every setting, what it accepts, its default, what it means.

    \b
      mtl settings train                  a section
      mtl settings train.precision        one setting
      mtl settings tasks.NAME.loss        the losses of every kind of task
    """
    from mtl_dist.config.reference import PAGE, as_markdown, as_text, part_of, reference
    from mtl_dist.recipe import Recipe

    sections = reference(Recipe)
    if key:
        sections = part_of(sections, key)
    say(PAGE * (not key) + as_markdown(sections) if markdown else as_text(sections))


def _write_recipe(dataset: Path, out: Path | None) -> None:
    """Write a recipe for a dataset to a new file, or to standard output."""
    from mtl_dist.data.inspect import inspect_dataset
    from mtl_dist.errors import UserError
    from mtl_dist.launch.gpus import num_gpus
    from mtl_dist.report.first_recipe import first_recipe
    from mtl_dist.shipped import write_new

    if out is not None and (out / "dataset.json").is_file():
        raise UserError(
            f"init: expected a new file or a folder as second argument, found the dataset {out}. A recipe is "
            "written for one dataset; add others to its data.train."
        )
    text = first_recipe(inspect_dataset(dataset), "gpu" if num_gpus() else "cpu")
    if out is None:
        say(text)
        return
    place = out / f"{dataset.resolve().name}.yaml" if out.is_dir() else out
    write_new(place, text)
    say(f"{place}: written; mtl train {place} trains by it")
