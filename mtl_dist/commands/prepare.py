"""The commands that pack images and labels into shards: `mtl prepare ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtl_dist.commands.options import class_names, fractions, named, numbers, words
from mtl_dist.commands.progress import progress_bar

if TYPE_CHECKING:
    from mtl_dist.data.manifest import Manifest
    from mtl_dist.importers.packing import PackOptions

Out = Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The new dataset's directory.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Decides the split and the stored order.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", show_default=False, help="Processes; without it as many as the data is worth."
    ),
]
MaxSkipped = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Unreadable images that may be left out; with 0 the first one stops it."
    ),
]
Verify = Annotated[bool, typer.Option(help="Decode every image once; without it only headers are read.")]
Val = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        show_default=False,
        help="The share of train to validate on, where there is no val; without it 0.1.",
    ),
]
Pairs = list[str] | None

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _prepare() -> None:
    """Pack images and labels into shards: plain WebDataset tars, an index and dataset.json.

    A directory that exists and is not empty is refused. Any sample may lack any label.

    \b
      mtl prepare digits data/digits
      mtl prepare folders photos/ data/breeds --task breed
      mtl prepare table labels.csv data/skin --image file --classification diagnosis=dx
      mtl prepare idx mnist/ data/mnist --task digit
    """


@app.command()
def digits(out: Out, seed: Seed = 0, workers: Workers = None) -> None:
    """scikit-learn's 1,797 handwritten digits: three tasks, nothing to download.

    Which digit (classification), how thick the stroke is (regression, measured from the picture), which
    pixels are ink (segmentation).

    \b
      mtl prepare digits data/digits
    """
    from mtl_dist.importers.digits import prepare_digits

    with progress_bar("pack") as show:
        manifest = prepare_digits(out, packing_options(seed, workers), show)
    summary(out, manifest)


@app.command()
def folders(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", show_default=False, help="A directory or a zip of class folders.")
    ],
    out: Out,
    task: Annotated[str, typer.Option(show_default=False, help="The task's name.")],
    mask: Annotated[
        Pairs,
        typer.Option(
            metavar="TASK=HOW",
            help="Masks made from the pictures: otsu, or the import path of a function of yours.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="FRACTIONS",
            show_default=False,
            help="Such as 0.8,0.1,0.1, where SRC has no train folder.",
        ),
    ] = None,
    val: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            show_default=False,
            help="The share of train to validate on, where SRC has train and test but no val.",
        ),
    ] = None,
    seed: Seed = 0,
    workers: Workers = None,
    max_skipped: MaxSkipped = 0,
    verify: Verify = True,
) -> None:
    """One folder per class: train|val|test/CLASS/..., or CLASS/... to be split.

    \b
      mtl prepare folders photos/ data/breeds --task breed
      mtl prepare folders photos.zip data/breeds --task breed --split 0.8,0.1,0.1
      mtl prepare folders cifar10.zip data/cifar10 --task object --mask shape=otsu --val 0.1
    """
    from mtl_dist.importers.folders import prepare_folders

    parts = None if split is None else fractions("--split", split)
    masks = named("--mask", mask, "HOW")
    options = packing_options(seed, workers, max_skipped, verify)
    with progress_bar("pack") as show:
        manifest = prepare_folders(src, out, task, parts, options, show, masks, val)
    summary(out, manifest)


@app.command()
def table(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", show_default=False, help="csv, tsv or json; or a directory or zip that holds one."
        ),
    ],
    out: Out,
    image: Annotated[str, typer.Option(metavar="COLUMN", help="The column of image files.")] = "file",
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default=False, help="Where the files are; without it beside FILE."),
    ] = None,
    classification: Annotated[
        Pairs, typer.Option(metavar="TASK=COLUMN", help="A class per image. May be given several times.")
    ] = None,
    multilabel: Annotated[
        Pairs, typer.Option(metavar="TASK=COLUMN", help="Any number of classes per image, as a|b.")
    ] = None,
    regression: Annotated[Pairs, typer.Option(metavar="TASK=COLUMN", help="A number per image.")] = None,
    segmentation: Annotated[
        Pairs,
        typer.Option(
            metavar="TASK=COLUMN|DIR", help="A mask per image: a column of files, or a folder of them."
        ),
    ] = None,
    classes: Annotated[
        Pairs,
        typer.Option(metavar="TASK=NAME,...", help="Class names by index, or by value as 0:NAME,255:NAME."),
    ] = None,
    unit: Annotated[
        Pairs, typer.Option(metavar="TASK=UNIT", help="The unit of a number, such as years.")
    ] = None,
    separator: Annotated[
        str, typer.Option(metavar="TEXT", help="What stands between a cell's classes.")
    ] = "|",
    split: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|FRACTIONS",
            show_default=False,
            help="A column, or such as 0.8,0.1,0.1. Without it a column or folders that name splits.",
        ),
    ] = None,
    seed: Seed = 0,
    workers: Workers = None,
    max_skipped: MaxSkipped = 0,
    verify: Verify = True,
) -> None:
    """A table of labels: one row per image, one column per task. An empty cell is a missing label.

    \b
      mtl prepare table labels.csv data/skin --image file --root images \\
          --classification diagnosis=dx --regression age=age --unit age=years \\
          --segmentation lesion=masks --split split
    """
    from mtl_dist.importers.table import prepare_table

    options = packing_options(seed, workers, max_skipped, verify)
    with progress_bar("pack") as show:
        manifest = prepare_table(
            file,
            out,
            image=image,
            root=root,
            classification=named("--classification", classification),
            multilabel=named("--multilabel", multilabel),
            regression=named("--regression", regression),
            segmentation=named("--segmentation", segmentation, "COLUMN or TASK=DIR"),
            classes=class_names("--classes", classes),
            units=named("--unit", unit, "UNIT"),
            separator=separator,
            split=None if split is None else numbers(split) or split,
            options=options,
            progress=show,
        )
    summary(out, manifest)


@app.command()
def idx(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", show_default=False, help="A directory or a zip of IDX files, .gz or not."
        ),
    ],
    out: Out,
    task: Annotated[str, typer.Option(help="The task's name.")] = "label",
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", show_default=False, help="Class names by label; without it the labels."
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT,...",
            show_default=False,
            help="Measured on every picture, a regression task each: thickness (px), slant (degrees).",
        ),
    ] = None,
    val: Val = None,
    seed: Seed = 0,
    workers: Workers = None,
) -> None:
    """MNIST and its relatives: train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-...

    \b
      mtl prepare idx mnist/ data/mnist --task digit
      mtl prepare idx mnist/ data/strokes --task digit --measure thickness,slant
    """
    from mtl_dist.importers.idx import prepare_idx

    names = words("--classes", classes) if classes is not None else None
    measures = words("--measure", measure) if measure is not None else []
    with progress_bar("pack") as show:
        manifest = prepare_idx(src, out, task, names, measures, val, packing_options(seed, workers), show)
    summary(out, manifest)


@app.command()
def cifar(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", show_default=False, help="A directory or a zip of .bin files, .gz or not."
        ),
    ],
    out: Out,
    heads: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", show_default=False, help="What a record's labels are, in their order."
        ),
    ],
    classes: Annotated[
        Pairs,
        typer.Option(
            metavar="HEAD=NAME,...",
            help="Class names by label; without it HEAD_label_names.txt, or the labels.",
        ),
    ] = None,
    val: Val = None,
    seed: Seed = 0,
    workers: Workers = None,
) -> None:
    """CIFAR's binary records: one byte per label, then 32x32x3 bytes; any number of labels.

    \b
      mtl prepare cifar cifar-100-binary/ data/cifar100 --heads coarse,fine
      mtl prepare cifar cifar-10-batches-bin/ data/cifar10 --heads label
    """
    from mtl_dist.importers.cifar import prepare_cifar

    names = {head: text.split(",") for head, text in named("--classes", classes, "NAME,...").items()}
    with progress_bar("pack") as show:
        manifest = prepare_cifar(
            src, out, words("--heads", heads), names, val, packing_options(seed, workers), show
        )
    summary(out, manifest)


@app.command()
def own(
    importer: Annotated[
        str, typer.Argument(metavar="IMPORT.PATH", show_default=False, help="A class of yours: an Importer.")
    ],
    out: Out,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", show_default=False, help="Arguments of its constructor."),
    ] = None,
    seed: Seed = 0,
    workers: Workers = None,
    max_skipped: MaxSkipped = 0,
    verify: Verify = True,
) -> None:
    """Data that only you can read, by a class of yours; docs/extend.md shows one.

    \b
      mtl prepare own my_project.importers.Scans data/scans folder=/mnt/scans every=2
    """
    from mtl_dist.importers.importer import prepare_own

    options = packing_options(seed, workers, max_skipped, verify)
    with progress_bar("pack") as show:
        manifest = prepare_own(importer, out, arguments or [], options, show)
    summary(out, manifest)


def packing_options(seed: int, workers: int | None, max_skipped: int = 0, verify: bool = True) -> PackOptions:
    """What the options that the commands share amount to."""
    from mtl_dist.importers.packing import PackOptions

    return PackOptions(verify=verify, max_skipped=max_skipped, workers=workers, seed=seed)


def summary(out: Path, manifest: Manifest) -> None:
    """What has been made, in a few lines."""
    splits = ", ".join(f"{split.num_samples:,} {name}" for name, split in manifest.splits.items())
    tasks = ", ".join(f"{name} ({info.kind})" for name, info in manifest.tasks.items())
    print(f"{out}: {splits}; {tasks}")
    for note in manifest.notes:
        print(f"note: {note}")
    print(f"Look at it with: mtl inspect {out}")
