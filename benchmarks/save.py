"""How long the step loop stands still for a checkpoint."""

from __future__ import annotations

import statistics
import tempfile
from itertools import pairwise, repeat
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.measuring import clock, first
from benchmarks.tables import Findings, Row
from benchmarks.training import Scene, build_trainer, random_batch
from mtl_dist.checkpoint import Best, Checkpoint, CheckpointWriter
from mtl_dist.engine.connect import Connection, connect
from mtl_dist.engine.settings import EngineSettings

_INTERVAL = 100
"""The steps between two checkpoints that the share is of."""


class _TimedWriter(CheckpointWriter):
    """Notes the moments at which the trainer may go on."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, keep_last=1)
        self.free_at: list[float] = []

    def submit(self, checkpoint: Checkpoint, best: Best | None = None) -> None:
        super().submit(checkpoint, best)
        self.free_at.append(clock(torch.device("cpu")))


def bench_save(
    backbone: str, batch: int, image_size: int, zero_stage: int | None, every: int, saves: int
) -> None:
    """Measure, and print a table. Every rank calls it."""
    connection = connect(EngineSettings(zero_stage=zero_stage), "fp32")  # type: ignore[arg-type]
    findings = measure_save(Scene(backbone, batch, image_size), connection, every, saves)
    if connection.world.is_main:
        findings.show(Console(width=110))
    connection.close()


def measure_save(scene: Scene, connection: Connection, every: int, saves: int) -> Findings:
    """Train with a checkpoint every so many steps: how long each kept the loop, on rank 0.

    Every rank calls it.
    """
    world = connection.world
    ends: list[float] = []
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as directory:
        writer = _TimedWriter(Path(directory))
        own_writer = writer if world.is_main else None
        trainer = build_trainer(scene, connection, writer=own_writer, checkpoint_every=every)
        # The first save warms up, and one step more is there to see that nothing is saved at the end.
        trainer.run(
            first(repeat(random_batch(scene, world.device)), every * (saves + 1)),
            lambda samples: ends.append(clock(world.device)),
        )
        writer.finish()
        size = sum(path.stat().st_size for path in Path(directory).rglob("*.safetensors"))
    steps = [b - a for n, (a, b) in enumerate(pairwise(ends), start=1) if n % every]
    stalls = [free - ends[every * (n + 1) - 1] for n, free in enumerate(writer.free_at)][1:] or [0.0]
    stall, step = statistics.median(stalls), statistics.median(steps)
    row: Row = {
        "engine": connection.describe(),
        "checkpoint, MiB": size / 2**20,
        "a step, ms": step * 1e3,
        "stands still, ms": stall * 1e3,
        "least": min(stalls) * 1e3,
        "most": max(stalls) * 1e3,
        f"of {_INTERVAL} steps, %": 100 * stall / (_INTERVAL * step),
    }
    return Findings(f"a checkpoint of {scene.describe()}, {saves} of them, every {every} steps", [row])
