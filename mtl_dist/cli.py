"""`mtl`, also `python -m mtl_dist`: the commands, in the order in which one meets them.

Every command imports what it needs when it runs, so that `mtl --help` does not wait for torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mtl_dist import __version__
from mtl_dist.commands import cluster, compare, data, machine, models, report, runs, start, study
from mtl_dist.commands.errors import TRUST, CommandGroup
from mtl_dist.processes import ending_at_once

app = typer.Typer(
    cls=CommandGroup,
    name="mtl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text comes in half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
start.add_to(app)
data.add_to(app)
runs.add_to(app)
report.add_to(app)
models.add_to(app)
compare.add_to(app)
study.add_to(app)
cluster.add_to(app)
machine.add_to(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mtl_dist {__version__}")
        raise typer.Exit


@app.callback()
def mtl(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    trust: Annotated[
        bool,
        typer.Option(
            TRUST,
            help="Of any command: import the code that a run or dataset of somebody else names.",
        ),
    ] = False,
) -> None:
    """Train one vision model for many tasks, with one recipe on a laptop, many GPUs or a cluster.

    The main road, on data that needs no download:

    \b
      mtl prepare digits data/digits                  pack images and labels
      mtl inspect data/digits                         look at what is in them
      mtl init digits                                 copy their recipe: digits.yaml
      mtl train digits.yaml                           train in this process
      mtl launch digits.yaml --nproc 2                train in two
      mtl evaluate runs/digits/RUN --split test       metrics of the best weights
      mtl report runs/digits/RUN                      a page with charts and pictures
      mtl predict runs/digits/RUN photo.png           answers for your own images

    Any value of a recipe can be given on the command line, and null takes a task out:

    \b
      mtl train digits.yaml optim.lr=3e-4 train.epochs=5 tasks.ink=null

    mtl COMMAND --help says more about each. A mistake in what you gave is one line each and exit code 2.
    """


@ending_at_once()
def main() -> None:
    """The entry point of the console script."""
    app(prog_name="mtl")
