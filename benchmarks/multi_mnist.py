"""Multi-MNIST from MNIST's four files: two overlapping digits in one picture, to be read apart.

The protocol of https://github.com/isl-org/MultiObjectiveOptimization (multi_mnist_loader.py; Sener and
Koltun, https://arxiv.org/abs/1810.04650): on a canvas of 36 x 36 one digit at the top left, another picture's
digit 6 pixels further down and right, the brighter of both where they overlap, resized to 28 x 28 by the
nearest pixel. The tasks are `left` and `right`. The second digits are drawn from a seed. The test
pictures are made of MNIST's test set alone.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image

from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.packing import pack

CANVAS, SIDE, SHIFT = 36, 28, 6
HEADERS = {"images": 16, "labels": 8}


def read_idx(folder: Path, part: str, what: str) -> np.ndarray:
    """The pictures (N, 28, 28) or the labels (N,) of `train` or `t10k`."""
    dimensions = {"images": 3, "labels": 1}[what]
    with gzip.open(folder / f"{part}-{what}-idx{dimensions}-ubyte.gz") as file:
        values = np.frombuffer(file.read(), np.uint8, offset=HEADERS[what])
    return values.reshape(-1, SIDE, SIDE) if what == "images" else values


def overlaid(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two digits (28, 28) on one canvas, resized to the size of one."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    canvas[:SIDE, :SIDE] = left
    place = canvas[SHIFT : SHIFT + SIDE, SHIFT : SHIFT + SIDE]
    np.maximum(place, right, out=place)
    return np.asarray(Image.fromarray(canvas).resize((SIDE, SIDE), Image.Resampling.NEAREST))


def records(folder: Path, part: str, num: int, seed: int) -> list[Record]:
    """The first `num` digits of a part, each with another one drawn from all of the part."""
    images, labels = read_idx(folder, part, "images"), read_idx(folder, part, "labels")
    others = np.random.default_rng(seed).integers(len(images), size=num)
    made = []
    for number, other in enumerate(others.tolist()):
        buffer = io.BytesIO()
        Image.fromarray(overlaid(images[number], images[other])).save(buffer, "PNG")
        both = {"left": int(labels[number]), "right": int(labels[other])}
        made.append(Record(f"{part}-{number:05d}", buffer.getvalue(), both))
    return made


def prepare_multi_mnist(mnist: Path, out: Path, train: int, val: int, test: int, seed: int) -> None:
    """Write the dataset; the last `val` of the `train` training pictures validate."""
    training = records(mnist, "train", train, seed)
    splits = {
        "train": training[:-val],
        "val": training[-val:],
        "test": records(mnist, "t10k", test, seed + 1),
    }
    digit = TaskSource("classification", tuple("0123456789"))
    pack(splits, out, {"left": digit, "right": digit}, "multi-mnist")
    print(f"{out}: {', '.join(f'{len(own):,} {split}' for split, own in splits.items())}")
