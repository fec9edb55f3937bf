"""`python -m benchmarks`: speed and memory on this machine, and the data of comparisons.

Every command imports what it needs when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_dist.commands.errors import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure speed and memory on this machine.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
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
      python -m benchmarks loader photos/
      python -m benchmarks loader photos/ --workers 0 --repeats 3
    """
    from benchmarks.loader import bench_loader

    bench_loader(images, num_images, num_small, workers, repeats)


@app.command()
def prepare(
    images: Annotated[
        Path, typer.Argument(exists=True, metavar="IMAGES", help="A folder or a .zip file of JPEGs.")
    ],
    num_images: Annotated[int, typer.Option(min=64, metavar="N", help="Repeat them to so many.")] = 1000,
    beside: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Another checkout, to measure too."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Take the median of so many.")] = 5,
) -> None:
    """Images per second of one core that `mtl prepare folders` packs, with every JPEG verified and without.

    \b
      python -m benchmarks prepare photos/
      git worktree add ../before v0.1 && python -m benchmarks prepare photos/ --beside ../before
    """
    from benchmarks.prepare import bench_prepare

    bench_prepare(images, num_images, beside, repeats)


@app.command()
def resume(
    samples: Annotated[int, typer.Option(min=10_000, metavar="N", help="The epoch's length.")] = 10_000_000,
    workers: Annotated[list[int], typer.Option(min=0, metavar="N", help="Worker processes.")] = [0, 2],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Take the median of so many.")] = 5,
) -> None:
    """How long the first batch takes at the start of a large epoch, and when resuming at 90% of it.

    Needs 32 bytes per sample in the temporary folder, for the index.
    """
    from benchmarks.resume import bench_resume

    bench_resume(samples, workers, repeats)


@app.command()
def balance(
    backbone: Annotated[list[str], typer.Option(metavar="NAME", help="The model's backbone.")] = ["resnet18"],  # noqa: B006
    tasks: Annotated[list[int], typer.Option(min=2, metavar="N", help="Tasks.")] = [3],  # noqa: B006
    masks: Annotated[int, typer.Option(min=0, metavar="N", help="Tasks of these with a U-Net head.")] = 0,
    image_size: Annotated[int, typer.Option(min=32, metavar="N", help="Pixels of a side.")] = 64,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images in a step.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Take the median of so many.")] = 5,
) -> None:
    """What balancing costs: time per step in parts of that with equal weights, peak memory, one solve.

    Beside torchjd's and LibMTL's own step where they are installed. On a GPU if there is one. Takes minutes:
    let the machine do nothing else.

    \b
      python -m benchmarks balance
      python -m benchmarks balance --backbone resnet18 --backbone resnet50 --tasks 3 --tasks 10
    """
    from benchmarks.balance import bench_balance
    from benchmarks.training import Scene

    scenes = [
        Scene(name, batch, image_size, num_tasks=num, num_masks=masks, optimizer="sgd")
        for name in backbone
        for num in tasks
    ]
    bench_balance(scenes, repeats)


@app.command()
def step(
    backbone: Annotated[list[str], typer.Option(metavar="NAME", help="One or several.")] = [  # noqa: B006
        "resnet18",
        "resnet50",
    ],
    precision: Annotated[list[str], typer.Option(metavar="NAME", help="fp32, bf16.")] = ["fp32", "bf16"],  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images per rank and step.")] = 16,
    image_size: Annotated[int, typer.Option(min=1, metavar="N", help="Pixels of a side.")] = 64,
    also: Annotated[
        list[str], typer.Option("--with", metavar="NAME", help="contiguous, compiled, loader.")
    ] = [],  # noqa: B006
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Of the loader, per rank.")] = 2,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps per turn.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Take the median of so many turns.")] = 5,
) -> None:
    """Our training step beside a plain PyTorch loop: same model, three heads, same batch, same optimizer.

    On a GPU also the share of what a large matrix product reaches there. Under torchrun or accelerate
    launch, DDP beside DDP.

    \b
      python -m benchmarks step --backbone resnet18
      python -m benchmarks step --precision bf16 --batch 256 --image-size 224 --with loader
      torchrun --nproc-per-node 2 -m benchmarks step
    """
    from typing import get_args

    from benchmarks.step import VARIANTS, bench_step
    from mtl_dist.engine.settings import Precision
    from mtl_dist.errors import UserError

    for option, given, choices in (
        ("--precision", precision, get_args(Precision)[:2]),
        ("--with", also, VARIANTS),
    ):
        odd = [name for name in given if name not in choices]
        if odd:
            raise UserError(f"{option}: expected one of {', '.join(choices)}, found {odd[0]!r}.")
    bench_step(backbone, precision, batch, image_size, also, workers, steps, repeats)  # type: ignore[arg-type]


@app.command()
def memory(
    backbone: Annotated[str, typer.Option(metavar="NAME", help="The model's backbone.")] = "resnet50",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images per rank and step.")] = 16,
    image_size: Annotated[int, typer.Option(min=1, metavar="N", help="Pixels of a side.")] = 128,
    ranks: Annotated[int, typer.Option(min=2, metavar="N", help="For DDP and ZeRO.")] = 2,
) -> None:
    """Peak memory with each kind of gradient checkpointing, under DDP and under ZeRO 0 to 3.

    And what gathering the whole state for a checkpoint takes, on rank 0 and on the others.
    """
    from benchmarks.memory import bench_memory

    bench_memory(backbone, batch, image_size, ranks)


@app.command()
def save(
    backbone: Annotated[str, typer.Option(metavar="NAME", help="The model's backbone.")] = "resnet50",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images per rank and step.")] = 8,
    image_size: Annotated[int, typer.Option(min=1, metavar="N", help="Pixels of a side.")] = 64,
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="Under DeepSpeed.")] = None,
    every: Annotated[int, typer.Option(min=2, metavar="N", help="Steps between checkpoints.")] = 20,
    saves: Annotated[int, typer.Option(min=1, metavar="N", help="Take the median of so many.")] = 5,
) -> None:
    """How long training stands still for a checkpoint, of which the rest is written in the background."""
    from benchmarks.save import bench_save

    bench_save(backbone, batch, image_size, zero_stage, every, saves)


@app.command("batch-norm")
def batch_norm(
    recipe: Annotated[Path, typer.Argument(exists=True, metavar="RECIPE", help="What is trained.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="A.B=VALUE", help="Values in place of the recipe's.")
    ] = None,
    steps: Annotated[list[int], typer.Option(min=1, metavar="N", help="Evaluate after so many.")] = [20, 60],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Trainings, from seed 0 on.")] = 3,
) -> None:
    """Rules for BatchNorm's running statistics on short runs: val's loss and metrics with each.

    One training per seed serves all rules, for training does not read the statistics.

    \b
      python -m benchmarks batch-norm configs/skin.yaml --steps 20 --steps 60 data.image_size=64
    """
    from rich.console import Console

    from benchmarks.batch_norm import bench_batch_norm

    bench_batch_norm(recipe, overrides or [], sorted(steps), seeds).show(Console())


@app.command("multi-mnist")
def multi_mnist(
    mnist: Annotated[Path, typer.Argument(exists=True, file_okay=False, metavar="MNIST", help="Its files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The dataset's folder.")],
    train: Annotated[int, typer.Option(min=2, metavar="N", help="Training pictures.")] = 60000,
    val: Annotated[int, typer.Option(min=1, metavar="N", help="Of these, for validation.")] = 5000,
    test: Annotated[int, typer.Option(min=1, metavar="N", help="Test pictures.")] = 10000,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the second digits' draw.")] = 0,
) -> None:
    """Multi-MNIST from MNIST's four files: two overlapping digits in one picture, to be read apart.

    \b
      python -m benchmarks multi-mnist MNIST data/multi-mnist --train 12000 --val 2000 --test 5000
      mtl compare benchmarks/multi-mnist.yaml --seeds 3 --methods uncertainty,famo,cagrad
    """
    from benchmarks.multi_mnist import prepare_multi_mnist

    prepare_multi_mnist(mnist, out, train, val, test, seed)


@app.command()
def gpu(
    out: Annotated[Path, typer.Argument(file_okay=False, metavar="OUT", help="For gpu.json and gpu.md.")],
    part: Annotated[str | None, typer.Option(metavar="NAME", help="This part alone, here.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small sizes, to try the script.")] = False,
) -> None:
    """Everything that wants a GPU: tests/gpu, step, loader, balancing, memory; benchmarks/gpu.sh calls it.

    \b
      benchmarks/gpu.sh
      MTL_BENCH_DEVICE=cpu benchmarks/gpu.sh --tiny
    """
    from benchmarks.gpu import PARTS, run_all, run_part
    from mtl_dist.errors import UserError

    if part is None:
        run_all(out, tiny)
    elif part in PARTS:
        run_part(part, out, tiny)
    else:
        raise UserError(f"--part: expected one of {', '.join(PARTS)}, found {part!r}.")


@app.command()
def serve(
    run: Annotated[Path, typer.Argument(exists=True, metavar="RUN", help="A run folder, or an export.")],
    image: Annotated[Path, typer.Argument(exists=True, metavar="IMAGE", help="What every request holds.")],
    clients: Annotated[list[int], typer.Option(min=1, metavar="N", help="At once.")] = [1, 16],  # noqa: B006
    requests: Annotated[int, typer.Option(min=10, metavar="N", help="Per turn.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Take the median of so many.")] = 5,
) -> None:
    """The service under load, with batching beside without: images per second, p50 and p99, memory.

    \b
      python -m benchmarks serve runs/digits/RUN digit.png
      python -m benchmarks serve runs/skin/RUN photo.jpg --clients 1 --clients 32
    """
    from benchmarks.serve import bench_serve

    bench_serve(run, image, clients, requests, repeats)


@app.command()
def pictures(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where they go.")] = Path("docs"),
) -> None:
    """Draw the pictures of docs/balancing.md, of what our methods and sums compute."""
    from benchmarks.explained import draw

    for path in draw(out):
        typer.echo(f"{path}: written")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
