"""What becomes of a trained model: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtl_dist.commands.runs import RunFolder
from mtl_dist.printable import say


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Use a run")(export)


def export(
    run: RunFolder,
    format: Annotated[
        Literal["onnx", "torch", "safetensors"],
        typer.Option(
            help="onnx: a graph for other runtimes; torch: an archive of torch.export; safetensors: weights, "
            "description and model card, as the Hugging Face hub has them."
        ),
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder to write into.", show_default="RUN/export/FORMAT"),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(metavar="best|last|STEP|best/TASK", help="Which weights.")
    ] = "best",
    any_size: Annotated[
        bool,
        typer.Option("--any-size", help="Images of any size, where the model takes it."),
    ] = False,
    resize_inside: Annotated[
        bool, typer.Option("--resize-inside", help="Let the graph resize images of any size by itself.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(metavar="PATH", show_default=False, help="Check with these in place of the run's data."),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME", show_default=False, help="Upload the folder to the Hugging Face hub."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to: for everybody to see.")] = False,
) -> None:
    """Take a run's model out, to run it elsewhere; held against the run on real images before it is kept.

    Outputs are named by task; classes, units and normalisation are in the file. mtl_dist.load reads it back.

    \b
      mtl export runs/digits/ID                               RUN/export/onnx/model.onnx
      mtl export runs/digits/ID --format safetensors --out digits-model
      mtl export runs/digits/ID --resize-inside               raw images of any size go in
    """
    from mtl_dist.exporting.description import Form
    from mtl_dist.exporting.export import export_run
    from mtl_dist.exporting.hub import check_push, push

    if push_to is not None:
        check_push(push_to, format)
    which = int(checkpoint) if checkpoint.isdigit() else checkpoint
    made = export_run(run, format, out, which, Form(any_size, resize_inside), images, say)
    say(
        f"{made.file}: {made.num_bytes / 1e6:.1f} MB in {made.seconds:.0f} s; outputs differ from the run's "
        f"by at most {made.difference:.1g}, on {made.images}"
    )
    if push_to is not None:
        say(push(made.path, push_to, public))
