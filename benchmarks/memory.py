"""The peak memory of training, and of gathering a checkpoint, case by case, each in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.contenders import balanced
from benchmarks.measuring import MEMORY_ENVIRONMENT, Gauge, first, memory_is_measured
from benchmarks.tables import Findings, Row
from benchmarks.training import Scene, build_trainer, random_batch
from mtl_dist.engine.connect import connect
from mtl_dist.engine.settings import EngineSettings
from mtl_dist.errors import UserError
from mtl_dist.models.settings import Checkpointing

CHECKPOINTINGS: tuple[Checkpointing, ...] = ("off", "stage", "block")
_STAGES: tuple[int | None, ...] = (None, 0, 1, 2, 3)
_STEPS = 3
_MEBI = 2**20


@dataclass(frozen=True)
class Case:
    """One training: under which engine (ZeRO's stage, or None), and with which method or other library."""

    scene: Scene
    stage: int | None = None
    contender: str = "equal"
    ranks: int = 1


@dataclass(frozen=True)
class Peaks:
    """Bytes, by rank: while training, and what gathering the whole state on rank 0 took on top.

    `state` is the size of that state; both are 0 for a step of another library.
    """

    training: list[int]
    gathering: list[int]
    state: int


def bench_memory(backbone: str, batch: int, image_size: int, ranks: int) -> None:
    """Measure, and print a table of gradient checkpointing and one of engines."""
    console = Console()
    for findings in measure_memory(Scene(backbone, batch, image_size), ranks):
        findings.show(console)


def measure_memory(scene: Scene, ranks: int) -> Iterator[Findings]:
    """Gradient checkpointing in one process; with several ranks also the engines.

    Raises:
        UserError: this machine does not say how much memory a process has used.
    """
    if not memory_is_measured():
        raise UserError("memory: expected a GPU, or Linux with its /proc, found neither.")
    alone = {f"checkpointing {mode}": Case(replace(scene, checkpointing=mode)) for mode in CHECKPOINTINGS}
    yield Findings(
        f"memory of {scene.describe()}, one process, MiB", [_row(name, case) for name, case in alone.items()]
    )
    if ranks > 1:
        together = {
            "DDP" if stage is None else f"ZeRO {stage}": Case(scene, stage, ranks=ranks) for stage in _STAGES
        }
        yield Findings(
            f"memory of {scene.describe()} per rank, {ranks} ranks, MiB",
            [_row(name, case) for name, case in together.items()],
        )


def _row(name: str, case: Case) -> Row:
    found = peaks(case)
    return {
        "": name,
        "training": max(found.training) / _MEBI,
        "gathering on rank 0": found.gathering[0] / _MEBI,
        "on the others": max(found.gathering[1:]) / _MEBI if case.ranks > 1 else None,
        "the state itself": found.state / _MEBI,
    }


def peaks(case: Case) -> Peaks:
    """One training in processes of its own."""
    command = [sys.executable, "-m"]
    if case.ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}", "-m"]
    command += ["benchmarks.memory", json.dumps(asdict(case))]
    environment = {**os.environ, **MEMORY_ENVIRONMENT}
    environment.setdefault("OMP_NUM_THREADS", "1")
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"training"')]
    if done.returncode or not answers:
        raise RuntimeError(f"a training failed:\n{done.stderr[-2000:]}")
    return Peaks(**json.loads(answers[0]))


def measure(case: Case) -> Peaks:
    """Train some steps and gather the state; on every rank, in a fresh process."""
    connection = connect(EngineSettings(zero_stage=case.stage), "fp32")  # type: ignore[arg-type]
    world = connection.world
    if case.stage is not None:
        from mtl_dist.engine.deepspeed_setup import import_deepspeed

        import_deepspeed()
    if case.contender != "equal":
        gauge = Gauge(world.device)
        balanced(case.scene, connection, case.contender)(_STEPS, gauge)
        return Peaks([gauge.noted], [0], 0)
    batch = random_batch(case.scene, world.device)
    gauge = Gauge(world.device)
    trainer = build_trainer(case.scene, connection)
    trainer.run(first(repeat(batch), _STEPS), gauge)
    host = Gauge(torch.device("cpu"))
    full = trainer.engine.full_state()
    gathering = host.peak()
    state = sum(t.nbytes for part in (full.model, full.optimizer) for t in part.values())
    found = Peaks(world.gather(gauge.noted), world.gather(gathering), world.broadcast(state))
    connection.close()
    return found


if __name__ == "__main__":
    stated = json.loads(sys.argv[1])
    answer = measure(Case(**stated | {"scene": Scene(**stated["scene"])}))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(asdict(answer)), flush=True)
