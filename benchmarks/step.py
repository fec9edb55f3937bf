"""Our training step beside a plain PyTorch loop with the same model, batch and optimizer."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import ours, plain
from benchmarks.loader import smooth_photo
from benchmarks.measuring import Steps, clock, in_turns, median_speed
from benchmarks.tables import Findings, Row
from benchmarks.training import NUM_CLASSES, Scene, build_parts, random_batch
from mtl_dist.batch import Batch
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import LabelCounts, Manifest, SplitInfo, write_manifest
from mtl_dist.data.settings import DataSettings, SourceSettings
from mtl_dist.data.shards import ShardWriter
from mtl_dist.engine.connect import Connection, connect
from mtl_dist.engine.precision import AUTOCAST_DTYPES
from mtl_dist.engine.settings import EngineSettings, Precision
from mtl_dist.specs import TaskInfo

VARIANTS = ("contiguous", "compiled", "loader")
"""What may be measured besides: images and weights not in channels-last memory; compiled parts; batches that
come from the loader."""

_PLAIN = "plain PyTorch"
_PRODUCT_SIZE = 8192
_IMAGES_ON_DISK = 256


def bench_step(
    backbones: Sequence[str],
    precisions: Sequence[Precision],
    batch: int,
    image_size: int,
    variants: Sequence[str],
    workers: int,
    steps: int,
    repeats: int,
) -> None:
    """Measure, and print a table per backbone and precision. Every rank calls it."""
    connection = connect(EngineSettings(), "fp32")
    world = connection.world
    console = Console(quiet=not world.is_main, width=110)
    on_gpu = world.device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    device = (
        torch.cuda.get_device_name(world.device) if on_gpu else "CPU, one thread per rank, processor time"
    )
    how = f"medians of {repeats} turns of {steps} steps"
    console.print(f"{connection.describe()}, {device}; torch {torch.__version__}; {how}")
    for backbone in backbones:
        for precision in precisions:
            scene = Scene(backbone, batch, image_size, precision)
            measure_step(scene, connection, variants, workers, steps, repeats).show(console)
    connection.close()


def measure_step(
    scene: Scene,
    connection: Connection,
    variants: Sequence[str],
    workers: int,
    steps: int,
    repeats: int,
) -> Findings:
    """A row for the plain loop, for ours and for each of `variants`. Every rank calls it."""
    world = connection.world
    with ExitStack() as stack:
        contenders = {_PLAIN: plain(scene, connection), "ours": ours(scene, connection)}
        for variant in variants:
            name, steps_of = _variant(variant, scene, connection, workers, stack)
            contenders[name] = steps_of
        seconds = in_turns(contenders, dict.fromkeys(contenders, steps), repeats, world.device)
    on_gpu = world.device.type == "cuda"
    peak = matrix_product_flops(world.device, scene.precision) if on_gpu else 0.0
    flops = step_flops(scene, world.device) if on_gpu else 0
    rows: list[Row] = []
    for name, own in seconds.items():
        median = statistics.median(own)
        rows.append(
            {
                "": name,
                "ms/step": median * 1e3,
                "images/s": scene.batch * world.size / median,
                "speed of plain": median_speed(own, seconds[_PLAIN]),
                **({"of peak": flops / median / peak} if on_gpu else {}),
            }
        )
    ranks = "" if world.size == 1 else f" per rank, {world.size} ranks"
    return Findings(f"a step of {scene.describe()}{ranks}", rows)


def _variant(
    variant: str, scene: Scene, connection: Connection, workers: int, stack: ExitStack
) -> tuple[str, Steps]:
    if variant == "contiguous":
        return "ours, not channels_last", ours(replace(scene, channels_last=False), connection)
    if variant == "compiled":
        return "ours, compiled", ours(replace(scene, compiled=True), connection)
    batches = stack.enter_context(loaded_batches(scene, connection, workers))
    return "ours, with loader", ours(scene, connection, batches=batches)


@contextmanager
def loaded_batches(scene: Scene, connection: Connection, workers: int) -> Iterator[Iterator[Batch]]:
    """Batches of JPEGs, read, decoded, cropped and flipped by the loader, without end."""
    world = connection.world
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as directory:
        _write_images(Path(directory), list(scene.kinds))
        settings = DataSettings(train=(SourceSettings(path=Path(directory)),), image_size=scene.image_size)
        loader = train_loader(
            open_data(settings, list(scene.kinds)),
            seed=0,
            global_batch=scene.batch * world.size,
            accumulation=1,
            rank=world.rank,
            world_size=world.size,
            start_position=0,
            end_position=10**9,
            workers=workers,
            pin_memory=world.device.type == "cuda",
        )
        yield iter(loader)


def _write_images(directory: Path, tasks: Sequence[str]) -> None:
    """A dataset of smooth noise, 320 x 256 pixels and about 15 kB each, with every task's label."""
    with ShardWriter(directory, "train", dict.fromkeys(tasks, "classification")) as writer:
        for number in range(_IMAGES_ON_DISK):
            labels = dict.fromkeys(tasks, number % NUM_CLASSES)
            writer.write(f"{number:05d}", smooth_photo(number, 320, 256), "jpg", labels, {})
    by_class = tuple(len(range(c, _IMAGES_ON_DISK, NUM_CLASSES)) for c in range(NUM_CLASSES))
    names = tuple(map(str, range(NUM_CLASSES)))
    info = TaskInfo("classification", names, num_labelled=_IMAGES_ON_DISK, class_counts=by_class)
    counts = dict.fromkeys(tasks, LabelCounts(_IMAGES_ON_DISK, 0, by_class))
    split = SplitInfo(_IMAGES_ON_DISK, tuple(writer.shards), counts)
    write_manifest(directory, Manifest(3, "uint8", dict.fromkeys(tasks, info), {"train": split}))


def step_flops(scene: Scene, device: torch.device) -> int:
    """Floating-point operations of one rank's forward and backward, as torch counts them."""
    model = build_parts(scene)[0].to(device)
    batch = random_batch(scene, device)
    with FlopCounterMode(display=False) as counter:
        outputs = model(batch.images_BCHW)
        torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    return counter.get_total_flops()


def matrix_product_flops(device: torch.device, precision: Precision, size: int = _PRODUCT_SIZE) -> float:
    """Operations per second of a large matrix product: the peak that this device reaches in practice."""
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(11):
        start = clock(device)
        torch.mm(left, right)
        times.append(clock(device) - start)
    return 2 * size**3 / statistics.median(times[1:])
