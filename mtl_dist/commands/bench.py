"""The commands about speed: bench loader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Measure speed on this machine, beside what others reach.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench", rich_help_panel="Machine")


@bench.command()
def loader(
    images: Annotated[
        Path, typer.Argument(exists=True, metavar="IMAGES", help="A folder or a .zip file of JPEGs.")
    ],
    num_images: Annotated[int, typer.Option(min=64, metavar="N", help="Repeat them to so many.")] = 960,
    num_small: Annotated[int, typer.Option(min=256, metavar="N", help="Small samples made of them.")] = 12800,
    workers: Annotated[list[int], typer.Option(min=0, metavar="N", help="Worker processes.")] = [0, 1, 2],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Take the median of so many.")] = 5,
) -> None:
    """Our loader beside webdataset, ImageFolder, and wids, mosaicml-streaming and litdata if installed.

    CPU time per image and images per second for reading, decoding, cropping to 224x224, flipping and
    batching; and the same for small samples. Takes minutes: let the machine do nothing else.

    \b
      mtl bench loader photos/
      mtl bench loader photos/ --workers 0 --repeats 3
    """
    from mtl_dist.report.bench_loader import bench_loader

    bench_loader(images, num_images, num_small, workers, repeats)
