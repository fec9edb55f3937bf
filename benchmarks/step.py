"""Our training step beside a plain PyTorch loop with the same model, batch and optimizer.

All contenders take turns in one process (or one group of ranks), so that a change in the machine's speed
meets them alike; what is shown are medians over the turns. Ours is `Trainer.run` itself, with everything it
does in a step: counts, masks, gradient norm, log. On CPUs the time is the processor's, with one thread per
rank, because the clock's swings with what else the machine does.
"""

from __future__ import annotations

import copy
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import (
    OPTIM,
    TASKS,
    Laps,
    Scene,
    build_trainer,
    clock,
    effort,
    first,
    random_batch,
)
from mtl_dist.batch import Batch
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import LabelCounts, Manifest, SplitInfo, write_manifest
from mtl_dist.data.settings import DataSettings, SourceSettings
from mtl_dist.data.shards import ShardWriter
from mtl_dist.engine.connect import Connection, EngineSettings, connect
from mtl_dist.engine.precision import AUTOCAST_DTYPES, Precision
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.optim import build_optimizer
from mtl_dist.specs import TaskInfo

VARIANTS = ("contiguous", "compiled", "loader")
"""What may be measured besides: images and weights not in channels-last memory; compiled parts; batches that
come from the loader."""

_PRODUCT_SIZE = 8192
_IMAGES_ON_DISK = 256

Turn = Callable[[int], float]
"""So many steps; the seconds that each took."""


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
    console.print(
        f"{world.size} ranks, {device}; {batch} images of {image_size} x {image_size} per rank; "
        f"torch {torch.__version__}; medians of {repeats} turns of {steps} steps"
    )
    for backbone in backbones:
        for precision in precisions:
            scene = Scene(backbone, batch, image_size, precision)
            with ExitStack() as stack:
                turns = _contenders(scene, connection, variants, workers, stack)
                seconds = _measured(turns, steps, repeats)
            console.print(_table(scene, connection, seconds))
    connection.close()


def _contenders(
    scene: Scene, connection: Connection, variants: Sequence[str], workers: int, stack: ExitStack
) -> dict[str, Turn]:
    batch = random_batch(scene, connection.world.device)
    turns = {"plain PyTorch": plain_turn(scene, connection, batch)}
    turns["ours"] = trainer_turn(scene, connection, repeat(batch))
    if "contiguous" in variants:
        turns["ours, not channels_last"] = trainer_turn(
            replace(scene, channels_last=False), connection, repeat(batch)
        )
    if "compiled" in variants:
        turns["ours, compiled"] = trainer_turn(replace(scene, compiled=True), connection, repeat(batch))
    if "loader" in variants:
        batches = stack.enter_context(loaded_batches(scene, connection, workers))
        turns["ours, with loader"] = trainer_turn(scene, connection, batches)
    return turns


def _measured(turns: dict[str, Turn], steps: int, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(repeats + 1):
        # Every second time in reverse: whoever follows the plain loop finds its caches.
        for name in list(turns) if number % 2 else reversed(list(turns)):
            taken = turns[name](steps)
            if number:  # the first turn warms up
                seconds[name].append(taken)
    return seconds


def trainer_turn(scene: Scene, connection: Connection, batches: Iterator[Batch]) -> Turn:
    """Steps of our trainer, which goes on where its last turn ended."""
    trainer = build_trainer(scene, connection)

    def turn(steps: int) -> float:
        laps = Laps(connection.world.device, steps)
        trainer.run(first(batches, steps + 1), laps)
        return laps.seconds_per_step

    return turn


def plain_turn(scene: Scene, connection: Connection, batch: Batch) -> Turn:
    """Steps of the loop that one writes by hand."""
    device = connection.world.device
    # The model that ours has, from the same seed.
    built: MultitaskModel = copy.deepcopy(build_trainer(scene, connection).root.model)
    optimizer = build_optimizer(OPTIM, built, list(TASKS), [])
    model: Any = built
    if connection.world.size > 1:
        model = DistributedDataParallel(built, device_ids=[device] if device.type == "cuda" else None)
    dtype = AUTOCAST_DTYPES.get(scene.precision)

    def turn(steps: int) -> float:
        start = effort(device)
        for _ in range(steps):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                outputs = model(batch.images_BCHW)
                losses = [F.cross_entropy(outputs[name], batch.targets[name]) for name in TASKS]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (effort(device) - start) / steps

    return turn


@contextmanager
def loaded_batches(scene: Scene, connection: Connection, workers: int) -> Iterator[Iterator[Batch]]:
    """Batches of JPEGs, read, decoded, cropped and flipped by the loader, without end."""
    world = connection.world
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as directory:
        _write_images(Path(directory))
        settings = DataSettings(train=(SourceSettings(path=Path(directory)),), image_size=scene.image_size)
        loader = train_loader(
            open_data(settings, list(TASKS)),
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


def _write_images(directory: Path) -> None:
    """A dataset of smooth noise, 320 x 256 pixels and about 15 kB each, with every task's label."""
    draws = np.random.default_rng(0)
    with ShardWriter(directory, "train", dict.fromkeys(TASKS, "classification")) as writer:
        for number in range(_IMAGES_ON_DISK):
            coarse = Image.fromarray(draws.integers(0, 256, (32, 40, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((320, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            labels = {name: number % classes for name, classes in TASKS.items()}
            writer.write(f"{number:05d}", buffer.getvalue(), "jpg", labels, {})
    infos, counts = {}, {}
    for name, classes in TASKS.items():
        by_class = tuple(len(range(c, _IMAGES_ON_DISK, classes)) for c in range(classes))
        names = tuple(map(str, range(classes)))
        infos[name] = TaskInfo("classification", names, num_labelled=_IMAGES_ON_DISK, class_counts=by_class)
        counts[name] = LabelCounts(_IMAGES_ON_DISK, 0, by_class)
    split = SplitInfo(_IMAGES_ON_DISK, tuple(writer.shards), counts)
    write_manifest(directory, Manifest(3, "uint8", infos, {"train": split}))


def _table(scene: Scene, connection: Connection, seconds: dict[str, list[float]]) -> Table:
    """Speeds relative to the plain loop are medians over the turns, not ratios of medians."""
    world = connection.world
    on_gpu = world.device.type == "cuda"
    table = Table(title=f"{scene.backbone}, {scene.precision}")
    columns = ["", "ms/step", "images/s", "speed of plain", *(["of peak"] if on_gpu else [])]
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    peak = matrix_product_flops(world.device, scene.precision) if on_gpu else 0.0
    flops = step_flops(scene, connection) if on_gpu else 0
    for name, own in seconds.items():
        median = statistics.median(own)
        speeds = [plain / ours for plain, ours in zip(seconds["plain PyTorch"], own, strict=True)]
        row = [name, f"{median * 1e3:,.1f}", f"{scene.batch * world.size / median:,.0f}"]
        row.append(f"{statistics.median(speeds):.3f}")
        table.add_row(*row, *([f"{flops / median / peak:.3f}"] if on_gpu else []))
    return table


def step_flops(scene: Scene, connection: Connection) -> int:
    """Floating-point operations of one rank's forward and backward, as torch counts them."""
    trainer = build_trainer(scene, connection)
    batch = random_batch(scene, connection.world.device)
    with FlopCounterMode(display=False) as counter:
        outputs = trainer.root.model(batch.images_BCHW)
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
