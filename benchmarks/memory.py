"""The peak memory of training, and of gathering a checkpoint, case by case.

Every case has fresh processes. On a GPU the peak is the allocator's. On a CPU it is the most resident memory
(`VmHWM`) beyond what the process held before it built anything; glibc is told to give every freed block of
64 KiB or more back at once, so that resident is what is in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.training import Scene, build_trainer, first, random_batch
from mtl_dist.engine.connect import EngineSettings, connect
from mtl_dist.errors import UserError
from mtl_dist.models.settings import Checkpointing

_CHECKPOINTINGS: tuple[Checkpointing, ...] = ("off", "stage", "block")
_STAGES: tuple[int | None, ...] = (None, 0, 1, 2, 3)
_STEPS = 3
_MEBI = 2**20


@dataclass(frozen=True)
class Peaks:
    """Bytes, by rank: while training, and what gathering the whole state on rank 0 took on top.

    `state` is the size of that state.
    """

    training: list[int]
    gathering: list[int]
    state: int


def bench_memory(backbone: str, batch: int, image_size: int, ranks: int) -> None:
    """Measure, and print a table of gradient checkpointing and one of engines."""
    if not Path("/proc/self/clear_refs").exists() and not torch.cuda.is_available():
        raise UserError("memory: expected a GPU, or Linux with its /proc, found neither.")
    console = Console()
    shown = f"{backbone}, fp32, AdamW, {batch} images of {image_size} x {image_size} per rank"
    alone = [
        (f"checkpointing {mode}", Scene(backbone, batch, image_size, checkpointing=mode), None, 1)
        for mode in _CHECKPOINTINGS
    ]
    console.print(_table(f"{shown}, one process", alone))
    together = [
        ("DDP" if stage is None else f"ZeRO {stage}", Scene(backbone, batch, image_size), stage, ranks)
        for stage in _STAGES
    ]
    console.print(_table(f"{shown}, {ranks} ranks", together))


def _table(title: str, cases: Sequence[tuple[str, Scene, int | None, int]]) -> Table:
    table = Table(title=title)
    for column in ("", "training, MiB", "gathering on rank 0", "on the others", "the state itself"):
        table.add_column(column, justify="right" if column else "left")
    for name, scene, stage, ranks in cases:
        found = _measured(scene, stage, ranks)
        others = f"{max(found.gathering[1:]) / _MEBI:,.0f}" if ranks > 1 else ""
        figures = (max(found.training), found.gathering[0], found.state)
        training, gathering, state = (f"{figure / _MEBI:,.0f}" for figure in figures)
        table.add_row(name, training, gathering, others, state)
    return table


def _measured(scene: Scene, stage: int | None, ranks: int) -> Peaks:
    """One training in processes of its own."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["benchmarks.memory", json.dumps([asdict(scene), stage])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"training"')]
    if done.returncode or not answers:
        raise RuntimeError(f"a training failed:\n{done.stderr[-2000:]}")
    return Peaks(**json.loads(answers[0]))


def measure(scene: Scene, stage: int | None) -> Peaks:
    """Train some steps and gather the state; on every rank, in a fresh process."""
    connection = connect(EngineSettings(zero_stage=stage), "fp32")  # type: ignore[arg-type]
    world = connection.world
    if stage is not None:
        from mtl_dist.engine.deepspeed_setup import import_deepspeed

        import_deepspeed()
    batch = random_batch(scene, world.device)
    gauge = _Gauge(world.device)
    trainer = build_trainer(scene, connection)
    trainer.run(first(repeat(batch), _STEPS))
    training = gauge.peak()
    host = _Gauge(torch.device("cpu"))
    full = trainer.engine.full_state()
    gathering = host.peak()
    state = sum(t.nbytes for part in (full.model, full.optimizer) for t in part.values())
    peaks = Peaks(world.gather(training), world.gather(gathering), world.broadcast(state))
    connection.close()
    return peaks


class _Gauge:
    """The most memory in use since it was made, beyond what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
            self._before = _resident("VmRSS")

    def peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _resident("VmHWM") - self._before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


if __name__ == "__main__":
    settings, wanted_stage = json.loads(sys.argv[1])
    found = measure(Scene(**settings), wanted_stage)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(asdict(found)), flush=True)
