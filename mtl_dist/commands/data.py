"""The commands about datasets: prepare, index, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.commands import prepare
from mtl_dist.commands.options import named, words
from mtl_dist.commands.prepare import summary
from mtl_dist.commands.progress import progress_bar

Pairs = list[str] | None


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Data")(inspect)
    app.command(rich_help_panel="Data")(index)
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
        print(f"{sheet}: samples of {split}")


def index(
    tars: Annotated[
        list[str],
        typer.Argument(
            metavar="TARS...",
            show_default=False,
            help="Tars, names with {000..099}, folders; also as URLs.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", show_default=False, help="The new dataset's directory.")
    ],
    image: Annotated[
        str | None,
        typer.Option(
            metavar="EXT,...", show_default=False, help="What is the image, such as jpg or left.png."
        ),
    ] = None,
    classification: Annotated[
        Pairs, typer.Option(metavar="TASK=FIELD", help="A class: cls, txt, json:breed, meta.json:dog.breed.")
    ] = None,
    multilabel: Annotated[
        Pairs, typer.Option(metavar="TASK=FIELD", help="Any number of classes: a list in JSON, or a|b.")
    ] = None,
    regression: Annotated[Pairs, typer.Option(metavar="TASK=FIELD", help="A number.")] = None,
    segmentation: Annotated[
        Pairs, typer.Option(metavar="TASK=EXT", help="A mask: an 8-bit grey PNG of class indices.")
    ] = None,
    classes: Annotated[
        Pairs,
        typer.Option(metavar="TASK=NAME,...", help="Class names by index; without it those that are found."),
    ] = None,
    unit: Annotated[
        Pairs, typer.Option(metavar="TASK=UNIT", help="The unit of a number, such as years.")
    ] = None,
    separator: Annotated[
        str, typer.Option(metavar="TEXT", help="What stands between classes in a text.")
    ] = "|",
    missing: Annotated[
        str | None,
        typer.Option(metavar="WORD,...", show_default=False, help="The words that mean no label."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse two texts for one class, such as 1 and 1.0.")
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="The split of all tars; without it their names decide, or it is train.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", show_default=False, help="Processes; without it one per core."),
    ] = None,
    max_skipped: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Unreadable images that may be left out; with 0 the first one stops it."
        ),
    ] = 0,
    verify: Annotated[
        bool, typer.Option(help="Decode every image once; without it only headers are read.")
    ] = True,
) -> None:
    """Index WebDataset tars that others wrote: they stay where they are, and OUT says what is in them.

    A sample is what WebDataset takes for one: members with the same name up to the first dot.

    \b
      mtl index 'in1k/train-{000..146}.tar' data/in1k --image jpg --classification label=cls
      mtl index laion/ data/laion --multilabel tags=json:tags --regression score=json:meta.score
    """
    from mtl_dist.importers.options import PackOptions
    from mtl_dist.importers.tars import FieldMapping, index_tars
    from mtl_dist.importers.wanted import class_names
    from mtl_dist.kinds.vocabulary import MISSING

    mapping = FieldMapping(
        image=image,
        classification=named("--classification", classification, "FIELD"),
        multilabel=named("--multilabel", multilabel, "FIELD"),
        regression=named("--regression", regression, "FIELD"),
        segmentation=named("--segmentation", segmentation, "EXT"),
        classes={
            task: class_names(task, text) for task, text in named("--classes", classes, "NAME,...").items()
        },
        units=named("--unit", unit, "UNIT"),
        separator=separator,
        strict=strict,
        missing=MISSING if missing is None else words("--missing", missing),
    )
    options = PackOptions(workers=workers, max_skipped=max_skipped, verify=verify)
    with progress_bar("tars") as show:
        manifest = index_tars(tars, out, mapping, split=split, options=options, progress=show)
    summary(out, manifest)
