"""The command about TIFF stacks: prepare stacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.commands.options import class_names, named, numbers, percentile_pair, stacks_by_split
from mtl_dist.commands.prepare import Out, Pairs, Seed, Workers, summary
from mtl_dist.commands.progress import progress_bar
from mtl_dist.errors import UserError


def add_to(prepare: typer.Typer) -> None:
    prepare.command()(stacks)


def stacks(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", show_default=False, help="A directory or a zip of TIFF stacks.")
    ],
    out: Out,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--stacks",
            metavar="PATTERN",
            show_default=False,
            help="Which files, as 'stack_*.tif': * is the name. Without it all that are no masks.",
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Values by stack, or by stack and page (from 0): columns stack, page and others.",
        ),
    ] = None,
    classification: Annotated[
        Pairs, typer.Option(metavar="TASK=COLUMN|folder", help="A class: a column, or the stack's folder.")
    ] = None,
    regression: Annotated[
        Pairs, typer.Option(metavar="TASK=COLUMN", help="A number per stack or page.")
    ] = None,
    segmentation: Annotated[
        Pairs, typer.Option(metavar="TASK=PATTERN", help="Masks as stacks, as cell='mask_*.tif'.")
    ] = None,
    classes: Annotated[
        Pairs,
        typer.Option(metavar="TASK=NAME,...", help="Class names by index, or by value as 0:NAME,255:NAME."),
    ] = None,
    unit: Annotated[
        Pairs, typer.Option(metavar="TASK=UNIT", help="The unit of a number, such as hours.")
    ] = None,
    frames: Annotated[
        str, typer.Option(metavar="WHICH", help="all, every:N, A:B (B left out), or pages as first,10,last.")
    ] = "all",
    time: Annotated[
        str | None,
        typer.Option(
            metavar="TASK", show_default=False, help="The time of a frame, page x --interval, as a task."
        ),
    ] = None,
    interval: Annotated[
        float | None, typer.Option(metavar="HOURS", show_default=False, help="Between two pages.")
    ] = None,
    onset: Annotated[
        Pairs,
        typer.Option(
            metavar="CLASS=HOUR|COLUMN|absent",
            help="From when the time of a class counts; without it from the start. absent: it has none.",
        ),
    ] = None,
    normalise: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            show_default=False,
            help="Percentiles of a stack's values that become 0 and 255, such as 1,99.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            show_default=False,
            help="A column, fractions, or SPLIT=STACK,... as 'val=sw;test=ne'. Without it a column or "
            "folders that name splits, else 0.8,0.1,0.1 of the stacks.",
        ),
    ] = None,
    seed: Seed = 0,
    workers: Workers = None,
) -> None:
    """Multi-page TIFFs: a sample per frame; masks as stacks; a stack is in one split.

    \b
      mtl prepare stacks cells/ data/cells --stacks 'stack_*.tif' --table frames.csv \\
          --regression count=cell_count --segmentation cell='mask_*.tif' --split 'val=sw'
      mtl prepare stacks wells/ data/wells --classification infected=folder \\
          --time hours --interval 0.5 --onset infected=4 --frames every:4 --normalise 1,99
    """
    from mtl_dist.importers.packing import PackOptions
    from mtl_dist.importers.stack_time import TimeTask
    from mtl_dist.importers.stacks import prepare_stacks

    if (time is None) != (interval is None) or (onset and time is None):
        raise UserError("--time: expected --time TASK and --interval HOURS together, found one alone.")
    options = PackOptions(workers=workers, seed=seed)
    with progress_bar("pack") as show:
        manifest = prepare_stacks(
            src,
            out,
            stacks=pattern,
            table=table,
            classification=named("--classification", classification, "COLUMN or TASK=folder"),
            regression=named("--regression", regression),
            segmentation=named("--segmentation", segmentation, "PATTERN"),
            classes=class_names("--classes", classes),
            units=named("--unit", unit, "UNIT"),
            frames=frames,
            time=None
            if time is None or interval is None
            else TimeTask(time, interval, named("--onset", onset, "HOUR")),
            normalise=None if normalise is None else percentile_pair("--normalise", normalise),
            split=None if split is None else numbers(split) or stacks_by_split("--split", split) or split,
            options=options,
            progress=show,
        )
    summary(out, manifest)
