"""Our loader beside others, over the same images, in one run.

Measured is CPU time per image of the whole process tree, because wall-clock time swings with what else the
machine does, and images per second. Every measurement is a process of its own that reads one epoch; they are
interleaved, so that a change in the machine's speed meets all loaders alike, and medians are shown.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from benchmarks.peer_loaders import PHOTOS, SMALL, SMALL_SIDE, TASK, Contender
from benchmarks.tables import Findings, Row
from mtl_dist.data.decode import decoder_name
from mtl_dist.data.manifest import LabelCounts, Manifest, SplitInfo, write_manifest
from mtl_dist.data.shards import ShardWriter
from mtl_dist.data.turbojpeg import find_turbojpeg
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo

_SHARD_SAMPLES = 120
_SMALL_SHARD_SAMPLES = 1200
_REFERENCE = "webdataset"


@dataclass(frozen=True)
class Cost:
    """What one epoch took, per image."""

    cpu_us: float
    images_per_s: float


def bench_loader(images: Path, num_images: int, num_small: int, workers: Sequence[int], repeats: int) -> None:
    """Measure, and print one table of photographs and one of small samples.

    Args:
        images: a folder or a .zip file of JPEGs, which are repeated to `num_images`.

    Raises:
        UserError: there are no JPEGs.
    """
    photos = list(jpegs_in(images))
    if not photos:
        raise UserError(f"{images}: expected JPEGs, found none.")
    torch.set_num_threads(1)
    console = Console()
    average = sum(map(len, photos)) / len(photos) / 1000
    console.print(
        f"{len(photos)} JPEGs of {average:.0f} kB on average, repeated to {num_images}; {decoder_name()}; "
        f"torch {torch.__version__}; {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; "
        f"medians of {repeats}"
    )
    measure_photos(photos, num_images, workers, repeats).show(console)
    for extension in SMALL:
        measure_small(photos, extension, num_small, workers[0], repeats).show(console)


def measure_photos(
    photos: Sequence[bytes], num_images: int, workers: Sequence[int], repeats: int
) -> Findings:
    """Every loader that is installed, over JPEGs repeated to `num_images`."""
    contenders = [
        c for c in PHOTOS if c.is_installed and not ("region" in c.name and find_turbojpeg() is None)
    ]
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as name:
        repeated = [photos[number % len(photos)] for number in range(num_images)]
        directory = _write(Path(name) / "photos", repeated, "jpg", 3, _SHARD_SAMPLES)
        for contender in contenders:
            if contender.prepare is not None:
                contender.prepare(directory, repeated)
        title = "loaders: crop 224, flip, batches of 64"
        return _findings(title, directory, contenders, workers, repeats)


def measure_small(
    photos: Sequence[bytes], extension: str, num_small: int, workers: int, repeats: int
) -> Findings:
    """Small samples made of the JPEGs."""
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as name:
        small = [_small(photos[number % len(photos)], number, extension) for number in range(num_small)]
        directory = _write(Path(name) / extension, small, extension, 1, _SMALL_SHARD_SAMPLES)
        title = f"loaders: {SMALL_SIDE}x{SMALL_SIDE} {extension}, batches of 256"
        return _findings(title, directory, SMALL[extension], [workers], repeats)


def smooth_photo(number: int, width: int, height: int) -> bytes:
    """A JPEG of smooth noise, another one for every number; 320 x 256 pixels are about 15 kB."""
    coarse = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    smooth.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _findings(
    title: str, directory: Path, contenders: Sequence[Contender], workers: Sequence[int], repeats: int
) -> Findings:
    costs: dict[tuple[str, int], list[Cost]] = {}
    for _ in range(repeats):
        for number in workers:
            for contender in contenders:
                cost = _measured(contender.batches, directory, number)
                costs.setdefault((contender.name, number), []).append(cost)
    rows: list[Row] = []
    for number in workers:
        reference = statistics.median(cost.cpu_us for cost in costs[_REFERENCE, number])
        for contender in contenders:
            mine = costs[contender.name, number]
            cpu = statistics.median(cost.cpu_us for cost in mine)
            rows.append(
                {
                    "loader": contender.name,
                    "workers": number,
                    "CPU us/image": cpu,
                    f"of {_REFERENCE}'s": cpu / reference,
                    "images/s": statistics.median(cost.images_per_s for cost in mine),
                }
            )
    return Findings(title, rows)


def _measured(batches: Callable[[Path, int], Any], directory: Path, workers: int) -> Cost:
    """An epoch in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_epoch, args=(sender, batches, directory, workers))
    process.start()
    sender.close()
    try:
        cost: Cost = receiver.recv()
    except EOFError:
        raise RuntimeError("a loader failed; its error is above") from None
    finally:
        process.join()
    return cost


def _epoch(sender: Connection, batches: Callable[[Path, int], Any], directory: Path, workers: int) -> None:
    warnings.simplefilter("ignore")
    with redirect_stdout(io.StringIO()):  # some speak
        loader = batches(directory, workers)
    began, cpu_began, count = time.perf_counter(), _cpu_seconds(), 0
    for batch in loader:
        count += len(batch[0] if isinstance(batch, list | tuple) else batch)
    wall = time.perf_counter() - began
    del loader  # its workers end, and their time is counted
    for child in multiprocessing.active_children():
        child.join()
    sender.send(Cost(1e6 * (_cpu_seconds() - cpu_began) / count, count / wall))


def _cpu_seconds() -> float:
    """CPU time of this process and of those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def jpegs_in(images: Path) -> Iterator[bytes]:
    """The JPEGs of a folder or a .zip file, sorted by name."""
    if images.is_dir():
        for path in sorted(images.rglob("*.jp*g")):
            yield path.read_bytes()
    elif zipfile.is_zipfile(images):
        with zipfile.ZipFile(images) as archive:
            for name in sorted(archive.namelist()):
                if name.lower().endswith((".jpg", ".jpeg")):
                    yield archive.read(name)


def _small(photo: bytes, number: int, extension: str) -> bytes:
    """A small grey piece of a photograph, a different one for every number."""
    with Image.open(io.BytesIO(photo)) as image:
        image.draft("L", (112, 112))
        side = (min(image.size) + 1) // 2
        at = number % (min(image.size) - side + 1)
        corners = (at, at, at + side, at + side)
        piece = image.convert("L").resize((SMALL_SIDE, SMALL_SIDE), box=corners)
    pixels, buffer = np.asarray(piece), io.BytesIO()
    if extension == "png":
        Image.fromarray(pixels).save(buffer, "PNG")  # without the photograph's colour profile
    else:
        np.save(buffer, pixels)
    return buffer.getvalue()


def _write(directory: Path, images: Sequence[bytes], extension: str, channels: int, per_shard: int) -> Path:
    """A dataset of one split and one task."""
    directory.mkdir()
    with ShardWriter(directory, "train", {TASK: "classification"}, max_samples=per_shard) as writer:
        for number, data in enumerate(images):
            writer.write(f"{number:07d}", data, extension, {TASK: number % 10}, {})
    counts = tuple(np.bincount(np.arange(len(images)) % 10, minlength=10).tolist())
    info = TaskInfo(
        "classification", classes=tuple("0123456789"), num_labelled=len(images), class_counts=counts
    )
    split = SplitInfo(len(images), tuple(writer.shards), {TASK: LabelCounts(len(images), 0, counts)})
    write_manifest(
        directory, Manifest(channels, "uint8", {TASK: info}, {"train": split}, name=directory.name)
    )
    return directory
