"""The commands about runs: train, launch, evaluate, predict, verify."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_dist.commands.errors import INTERRUPTED
from mtl_dist.commands.progress import progress_bar
from mtl_dist.errors import UserError
from mtl_dist.plural import plural
from mtl_dist.printable import printable_lines, say

if TYPE_CHECKING:
    from mtl_dist.recipe import Recipe

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", show_default=False, help="A recipe, such as configs/digits.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="A.B=VALUE",
        show_default=False,
        help="Values in place of the recipe's, read as YAML; null takes a task out.",
    ),
]

RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", show_default=False, help="A run folder: runs/NAME/ID."),
]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="best|last|STEP|best/TASK", help="Which weights.")
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        show_default=False,
        help="The run's folder; one that exists is taken up again. Without it a new one below runs/NAME.",
    ),
]
Tags = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        metavar="WORD",
        show_default=False,
        help="A word by which mtl status and mtl runs find it; several are allowed.",
    ),
]

NprocOfEach = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        metavar="N",
        show_default=False,
        help="Processes of each training; without it one per GPU (of its share), or one.",
    ),
]
"""Of commands that train many times."""

StartFrom = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN",
        show_default=False,
        help="Begin a new run with the best weights of this one, as far as they fit.",
    ),
]
DataMoved = Annotated[
    bool,
    typer.Option(
        "--data-moved",
        help="With --run-dir: the run's data lies in another place now, and is checked to be the same.",
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(rich_help_panel="Train")(train)
    app.command(rich_help_panel="Train")(launch)
    app.command(rich_help_panel="Use a run")(evaluate)
    app.command(rich_help_panel="Use a run")(predict)
    app.command(rich_help_panel="Use a run")(verify)


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    tag: Tags = None,
    start_from: StartFrom = None,
    data_moved: DataMoved = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show model, batch (debug/batch.png), gradients and time, and overfit one batch: a minute.",
        ),
    ] = False,
    pdb: Annotated[bool, typer.Option("--pdb", help="Open the debugger where the training fails.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete recipe, defaults included, and stop.")
    ] = False,
) -> None:
    """Train a recipe in this process, or in each that a launcher starts.

    \b
      mtl train configs/digits.yaml
      mtl train configs/digits.yaml optim.lr=3e-4 train.epochs=5 tasks.ink=null
      mtl train configs/digits.yaml --print-config
      mtl train configs/digits.yaml --debug --pdb                 find what is wrong
      mtl train configs/digits.yaml --run-dir runs/digits/ID      go on where it stopped
      mtl train configs/mine.yaml --from runs/digits/ID           a new run with the weights of that one

    Several processes, on GPUs or CPUs (see also mtl launch):

    \b
      accelerate launch --config_file launch/ddp.yaml -m mtl_dist train configs/digits.yaml
      torchrun --nproc-per-node 2 -m mtl_dist train configs/digits.yaml
    """
    from mtl_dist.recipe import load_recipe

    loaded = load_recipe(recipe, _with_start(overrides, start_from))
    if print_config:
        from mtl_dist.config.loading import to_yaml

        print(printable_lines(to_yaml(loaded)), end="")
        return
    if debug:
        _refuse_with_debug({"--run-dir": run_dir, "--tag": tag, "--data-moved": data_moved})
    from mtl_dist.debug.post_mortem import post_mortem

    with post_mortem(pdb):
        if not debug:
            _train(loaded, run_dir, tag or [], data_moved)
            return
        from mtl_dist.debug.overfit import overfit_one_batch

        learnt = overfit_one_batch(loaded)
    raise typer.Exit(0 if learnt else 1)


def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Processes; without it one per GPU, or as the config file says.",
        ),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config-file",
            metavar="FILE",
            show_default=False,
            help="A config file of accelerate, such as launch/zero2.yaml.",
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Machines that train together; start this on each.")
    ] = 1,
    node_rank: Annotated[
        int | None,
        typer.Option(
            "--node-rank", metavar="R", show_default=False, help="Which machine this is: 0 is the first."
        ),
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            show_default=False,
            help="Where they meet: an address of the first machine, and a free port there.",
        ),
    ] = None,
    run_dir: RunDir = None,
    tag: Tags = None,
    start_from: StartFrom = None,
    data_moved: DataMoved = False,
) -> None:
    """Train a recipe in several processes, on this machine or on several.

    The short form of accelerate launch: one process per GPU (NCCL), or processes that share the CPU (gloo).
    Ctrl-C lets them save together and leave; the same command with --run-dir goes on from there.

    \b
      mtl launch configs/digits.yaml --nproc 2
      mtl launch configs/digits.yaml --nproc 4 train.precision=bf16
      mtl launch configs/digits.yaml --config-file launch/zero2.yaml

    On several machines without a cluster, which share the run's folder; here on the second of two:

    \b
      mtl launch configs/digits.yaml --nodes 2 --node-rank 1 --rendezvous gpu1:29500 --nproc 4
    """
    from mtl_dist.engine.rank_environment import check_slurm_step
    from mtl_dist.launch.gpus import num_gpus
    from mtl_dist.launch.local import check_rendezvous, machines_of, plan_launch, supervise
    from mtl_dist.recipe import load_recipe
    from mtl_dist.run_folder import checked_tags

    # Read here first, so that a mistake is said once and nothing starts.
    loaded = load_recipe(recipe, _with_start(overrides, start_from))
    arguments = ["train", str(recipe), *(overrides or []), *(["--run-dir", str(run_dir)] if run_dir else [])]
    arguments += [f"--tag={word}" for word in checked_tags(tag or [])]
    arguments += ["--from", str(start_from)] if start_from else []
    arguments += ["--data-moved"] if data_moved else []
    machines = machines_of(nodes, node_rank, rendezvous)
    if machines is None:
        check_slurm_step(os.environ)
    else:
        check_rendezvous(machines)
    plan = plan_launch(arguments, nproc, config_file, num_gpus(), machines)
    if plan is None:
        _train(loaded, run_dir, tag or [], data_moved)
        return
    loaded.train.accumulation_on(plan.num_processes)
    if machines is not None:
        say(f"machine {machines.rank} of {machines.count}, meeting at {rendezvous}")
    raise typer.Exit(supervise(plan))


def _refuse_with_debug(options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise UserError(f"--debug: expected no {given[0]}, for it makes no run. Leave one of them out.")


def _with_start(overrides: list[str] | None, start_from: Path | None) -> list[str | Mapping[str, Any]]:
    """The overrides with `--from RUN`, which is one too."""
    start = [] if start_from is None else [{"start_from": str(start_from)}]
    return [*(overrides or []), *start]


def check_there(run: Path) -> None:
    """Refuse a run that is not there before torch is imported, which takes seconds.

    Raises:
        UserError: nothing is there.
    """
    if not os.path.exists(run):
        from mtl_dist.run_folder import RunFolder

        RunFolder.open(run)


def which(checkpoint: str) -> str | int:
    """A step is a number."""
    return int(checkpoint) if checkpoint.isdecimal() else checkpoint


def _train(recipe: Recipe, run_dir: Path | None, tags: Sequence[str], data_moved: bool) -> None:
    from mtl_dist.engine.rank_environment import check_slurm_step

    check_slurm_step(os.environ)  # before anything slow, while all tasks of a step are there
    from mtl_dist.run_folder import checked_tags
    from mtl_dist.runs.train import train

    outcome = train(recipe, run_dir, tags=checked_tags(tags), data_moved=data_moved)
    # Under a launcher a rank that left early with an error would have the others killed while they finish.
    if outcome.state == "stopped" and "RANK" not in os.environ:
        raise typer.Exit(INTERRUPTED)


def evaluate(
    run: RunFolder,
    split: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="train, val or test; without it test, or val where the data has no test.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            show_default=False,
            help="Measure on the split of this dataset: another one, or the run's own in another place.",
        ),
    ] = None,
    predictions: Annotated[
        bool,
        typer.Option(
            "--predictions",
            help="Write a row for each sample: its labels, answers and losses. docs/predict.md",
        ),
    ] = False,
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="best, last, a step, or best/TASK: the best of that task, where monitor.per_task keeps it.",
        ),
    ] = "best",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Print the metrics of each class too. docs/metrics.md")
    ] = False,
    temperature: Annotated[
        bool,
        typer.Option(
            "--temperature",
            help="Fit temperatures of probabilities on val, show what they do, keep them. docs/predict.md",
        ),
    ] = False,
) -> None:
    """Measure a run's best weights on a split: test, or val where there is none.

    Prints a table; writes evaluation/metrics.json and the confusion matrices into the run folder. Classes and
    statistics are the run's. Data that is another than in training is refused, unless --data names it.

    \b
      mtl evaluate runs/digits/ID --split test
      mtl evaluate runs/digits/ID --split train --predictions     find labels that are wrong
      mtl evaluate runs/digits/ID --split val --data data/other-digits
      mtl evaluate runs/digits/ID --checkpoint best/digit
      mtl evaluate runs/digits/ID --per-class
      mtl evaluate runs/digits/ID --temperature       then mtl predict ... --temperature
    """
    from mtl_dist.data.remote import location

    check_there(run)
    from mtl_dist.runs.evaluation import evaluate_run

    dataset = None if data is None else location(data)
    evaluate_run(run, split, dataset, predictions, which(checkpoint), per_class, temperature)


def predict(
    run: RunFolder,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            show_default=False,
            help="Images, folders, patterns, zips, tars, prepared datasets; - reads an image, or paths, from "
            "standard input.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Write here instead of printing: .jsonl, .csv or .parquet.",
        ),
    ] = None,
    overlays: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default=False, help="Write masks, and images with their mask, here."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            show_default=False,
            help="Above which probability a label, positive class or pixel counts, in place of the run's.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Of prepared datasets: this split alone."),
    ] = None,
    checkpoint: Checkpoint = "best",
    temperature: Annotated[
        bool,
        typer.Option(
            "--temperature",
            help="Give probabilities at the temperatures that mtl evaluate RUN --temperature has fitted.",
        ),
    ] = False,
) -> None:
    """Answer for images: one line of JSON, or row of a table, for each.

    A stack has a row for each page (stack.tif#0, ...). What cannot be read has a row with an error; the rest
    goes on, and the exit code is 1.

    \b
      mtl predict runs/digits/ID photo.png
      mtl predict runs/skin/ID photos/ --out answers.csv --overlays masks/
      mtl predict runs/cells/ID stack.tif 'more/**/*.png' more.zip data/cells --split test
      find photos -name '*.jpg' | mtl predict runs/skin/ID -
    """
    check_there(run)
    from mtl_dist.prediction.files import predict_files

    with progress_bar("predict") as show:
        num_images, num_errors = predict_files(
            run,
            images,
            out=out,
            overlays=overlays,
            threshold=threshold,
            split=split,
            checkpoint=which(checkpoint),
            temperature=temperature,
            stdin=sys.stdin.buffer,
            note=lambda line: say(line, sys.stderr),
            done=show if out is not None else None,
        )
    if out is not None:
        say(f"{out}: {plural(num_images, 'image')}")
    if num_errors:
        say(f"{num_errors} of {plural(num_images, 'image')} could not be read.", sys.stderr)
        raise typer.Exit(1)


def verify(run: RunFolder) -> None:
    """Check that a run's checkpoints are whole, byte by byte, and that no weight in them is NaN or infinite.

    Exit code 1 if one is not so. Training and evaluation pass over damaged ones by themselves.

    \b
      mtl verify runs/digits/ID
    """
    check_there(run)
    from mtl_dist.runs.verification import verify

    good, problems = verify(run)
    for name in good:
        say(f"{name}: good")
    for line in problems:
        say(line, sys.stderr)
    if problems:
        raise typer.Exit(1)
