"""What becomes of a trained model: export, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtl_dist.commands.runs import Checkpoint, RunFolder, check_there, which
from mtl_dist.printable import say


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Use a run")(export)
    app.command(rich_help_panel="Use a run")(serve)


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
    checkpoint: Checkpoint = "best",
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
    temperature: Annotated[
        bool,
        typer.Option(
            "--temperature",
            help="With the temperatures that mtl evaluate RUN --temperature has fitted: answers are by them.",
        ),
    ] = False,
) -> None:
    """Take a run's model out, to run it elsewhere; held against the run on real images before it is kept.

    Outputs are named by task; classes, units and normalisation are in the file. mtl_dist.load reads it back.

    \b
      mtl export runs/digits/ID                               RUN/export/onnx/model.onnx
      mtl export runs/digits/ID --format safetensors --out digits-model
      mtl export runs/digits/ID --resize-inside               raw images of any size go in
    """
    from mtl_dist.exporting.packages import check_packages

    check_there(run)
    check_packages(format)  # before torch is imported, which takes seconds
    from mtl_dist.exporting.description import Form
    from mtl_dist.exporting.export import export_run
    from mtl_dist.exporting.hub import check_push, push

    if push_to is not None:
        check_push(push_to, format)
    made = export_run(
        run, format, out, which(checkpoint), Form(any_size, resize_inside), images, say, temperature
    )
    say(
        f"{made.file}: {made.num_bytes / 1e6:.1f} MB in {made.seconds:.0f} s; outputs differ from the run's "
        f"by at most {made.difference:.1g}, on {made.images}"
    )
    if push_to is not None:
        say(push(made.path, push_to, public))


def serve(
    run: RunFolder,
    host: Annotated[str, typer.Option(help="0.0.0.0 answers whoever reaches this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Annotated[
        str | None,
        typer.Option(show_default=False, help="cpu, cuda, cuda:1; without it a GPU if there is one."),
    ] = None,
    checkpoint: Checkpoint = "best",
    temperature: Annotated[
        bool,
        typer.Option(
            "--temperature",
            help="Give probabilities at the temperatures that mtl evaluate RUN --temperature has fitted.",
        ),
    ] = False,
    max_mb: Annotated[float, typer.Option(min=0.001, help="Of one request, all files together.")] = 32,
    max_files: Annotated[int, typer.Option(min=1, help="In one request.")] = 16,
    max_megapixels: Annotated[float, typer.Option(min=0.0001, help="Of an image.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Images that wait; one more is answered 429.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images at once; 1 is no batching.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may take.")] = 30,
) -> None:
    """Answer for images over HTTP: POST /predict, and a page where one drops a picture.

    Also GET /model, /health, /metrics (Prometheus), /openapi.json. It answers this machine alone, unless
    --host says otherwise, and there is no login. RUN may also be what mtl export made.

    \b
      mtl serve runs/digits/ID
      curl -F files=@photo.png http://127.0.0.1:8000/predict
    """
    from mtl_dist.serving.packages import check_packages

    check_there(run)
    check_packages()  # before torch is imported, which takes seconds
    from mtl_dist.serving.limits import Limits
    from mtl_dist.serving.serve import serve as run_service

    limits = Limits(int(max_mb * 1e6), max_files, int(max_megapixels * 1e6), queue, batch, timeout)
    run_service(run, host, port, limits, device, which(checkpoint), temperature, say)
