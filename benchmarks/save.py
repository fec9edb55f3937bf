"""How long the step loop stands still for a checkpoint."""

from __future__ import annotations

import statistics
import tempfile
from itertools import pairwise, repeat
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.measuring import clock, first
from benchmarks.training import Scene, build_trainer, random_batch
from mtl_dist.checkpoint import Checkpoint, CheckpointWriter
from mtl_dist.engine.connect import connect
from mtl_dist.engine.settings import EngineSettings

_INTERVAL = 100
"""The steps between two checkpoints that the share is of."""


class _TimedWriter(CheckpointWriter):
    """Notes the moments at which the trainer may go on."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, keep_last=1)
        self.free_at: list[float] = []

    def submit(self, checkpoint: Checkpoint, best: tuple[str, float] | None = None) -> None:
        super().submit(checkpoint, best)
        self.free_at.append(clock(torch.device("cpu")))


def bench_save(
    backbone: str, batch: int, image_size: int, zero_stage: int | None, every: int, saves: int
) -> None:
    """Train with a checkpoint every so many steps, and print how long each kept the loop.

    Every rank calls it.
    """
    connection = connect(EngineSettings(zero_stage=zero_stage), "fp32")  # type: ignore[arg-type]
    world = connection.world
    scene = Scene(backbone, batch, image_size)
    ends: list[float] = []
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as directory:
        writer = _TimedWriter(Path(directory))
        trainer = build_trainer(
            scene, connection, writer=writer if world.is_main else None, checkpoint_every=every
        )
        # The first save warms up, and one step more is there to see that nothing is saved at the end.
        trainer.run(
            first(repeat(random_batch(scene, world.device)), every * (saves + 1)),
            lambda samples: ends.append(clock(world.device)),
        )
        writer.finish()
        size = sum(path.stat().st_size for path in Path(directory).rglob("*.safetensors"))
    if world.is_main:
        stalls = [free - ends[every * (n + 1) - 1] for n, free in enumerate(writer.free_at)][1:]
        steps = [b - a for n, (a, b) in enumerate(pairwise(ends), start=1) if n % every]
        stall, step = statistics.median(stalls), statistics.median(steps)
        enough = stall / 0.05 / _INTERVAL
        Console(width=110).print(
            f"{backbone}, {connection.describe()}, {world.device.type}: {size / 2**20:,.0f} MiB "
            f"every {every} steps of {step * 1e3:,.0f} ms.\n"
            f"The loop stands still for {stall * 1e3:,.0f} ms (median of {len(stalls)}; "
            f"{min(stalls) * 1e3:,.0f} to {max(stalls) * 1e3:,.0f}): {stall / (_INTERVAL * step):.2%} of "
            f"{_INTERVAL} such steps, 5% of {_INTERVAL} steps of {enough * 1e3:,.0f} ms."
        )
    connection.close()
