"""Runs whose ranks are killed: each rank a process forked from a server that has imported everything already.

    with Killing() as killing:
        attempt = killing.attempt(recipe, run, ranks=2, kill=Kill(rank=1, beat=30, delay_s=0.01))

A rank kills itself some time after a beat of its main thread (heartbeat.py), which may be in a forward, a
save, an evaluation, the start; the others are killed soon after it, as a machine is lost. Before each step
every rank notes which samples it is about to use. What it prints is in RUN.RANK.log;
it works in a folder of its own, RUN.RANK, as on a machine of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from tests.full_disks import fill_disk

PRELOADED = [
    "torch",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "deepspeed",
    "mtl_dist.runs.train",
    "mtl_dist.engine.deepspeed_engine",
    "tests.tiny_runs",
    "tests.killed_runs",
]
_LONGEST_S = 240.0
_FULL = 4096
"""Bytes that no file may outgrow on a disk that is full."""


@dataclass(frozen=True)
class Kill:
    """When a rank is killed: so long after a beat."""

    rank: int
    beat: int
    delay_s: float


@dataclass
class Attempt:
    """How an attempt ended: the ranks' exit codes, and how many beats rank 0 had made."""

    codes: list[int]
    beats: int = 0

    @property
    def done(self) -> bool:
        return all(code == 0 for code in self.codes)


@dataclass
class Killing:
    """Starts attempts; `count` is how many of each disturbance there were."""

    count: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def attempt(
        self,
        recipe: Path,
        run: Path,
        overrides: Sequence[str],
        *,
        ranks: int = 1,
        kill: Kill | None = None,
        full: int | None = None,
        dropout: bool = True,
        grace_s: float = 0.0,
    ) -> Attempt:
        """One start of the run, which ends by itself, by a kill or by a full disk.

        Args:
            full: The rank whose disk is full.
            grace_s: How long the other ranks live after the one that was killed.
        """
        from torch.distributed import TCPStore

        store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        beats = self._context.RawValue("q", 0)
        processes: list[Any] = []
        for rank in range(ranks):
            environment = _environment(rank, ranks, store.port)
            own = kill if kill is not None and kill.rank == rank else None
            arguments = (
                environment,
                str(recipe),
                str(run),
                tuple(overrides),
                own,
                full == rank,
                dropout,
                beats,
            )
            process = self._context.Process(target=_live, args=arguments, daemon=True)
            process.start()
            processes.append(process)
        _wait_for_the_first(processes)
        deadline = time.monotonic() + (grace_s if kill is not None or full is not None else _LONGEST_S)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        found = Attempt([process.exitcode for process in processes], int(beats.value))
        if -signal.SIGKILL in found.codes:
            self.count["kills"] += 1
        elif full is not None and not found.done:
            self.count["full disks"] += 1
        return found


def _wait_for_the_first(processes: Sequence[BaseProcess]) -> None:
    multiprocessing.connection.wait([process.sentinel for process in processes], timeout=_LONGEST_S)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    common = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if ranks == 1:
        return common
    return common | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


# ---------------------------------------------------------------- in a rank
def _live(
    environment: dict[str, str],
    recipe: str,
    run: str,
    overrides: Sequence[str],
    kill: Kill | None,
    full: bool,
    dropout: bool,
    beats: Any,
) -> None:
    from mtl_dist.errors import UserError
    from tests.tiny_runs import train_run

    os.environ.update(environment)
    rank = int(environment.get("RANK", "0"))
    sys.stdout = sys.stderr = open(f"{run}.{rank}.log", "a", buffering=1)  # noqa: SIM115 (of a process that ends)
    own_folder = Path(f"{run}.{rank}")
    own_folder.mkdir(exist_ok=True)
    os.chdir(own_folder)
    if full:
        fill_disk(_FULL)
    _note_samples(Path(f"{run}.samples.{rank}"), rank)
    threading.Thread(target=_watch, args=(kill, beats if rank == 0 else None), daemon=True).start()
    code = 1
    try:
        code = 0 if train_run(Path(recipe), Path(run), overrides, dropout=dropout) == "done" else 3
    except UserError as error:
        print(error)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _watch(kill: Kill | None, beats: Any) -> None:
    from mtl_dist.heartbeat import last_beat

    while True:
        turn = last_beat().turn
        if beats is not None:
            beats.value = turn
        if kill is not None and turn >= kill.beat:
            time.sleep(kill.delay_s)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0005)


def _note_samples(path: Path, rank: int) -> None:
    """Before a step the keys of its samples are noted, in one line of a file beside the run folder."""
    from mtl_dist.training.trainer import Trainer

    agree = Trainer._agree

    def agreed(trainer: Trainer, window: Any) -> Any:
        result = agree(trainer, window)
        pairs = [pair for batch in window for pair in zip(batch.keys, batch.valid_B.tolist(), strict=True)]
        keys = [key for key, valid in pairs if valid]
        noted = {"step": trainer.progress.step, "rank": rank, "size": trainer.world.size, "keys": keys}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(noted) + "\n")
        return result

    Trainer._agree = agreed  # type: ignore[method-assign]


def samples_of_steps(run: Path) -> dict[int, list[str]]:
    """The keys that each step used the last time it was made, over all ranks."""
    noted: dict[int, dict[int, dict[str, Any]]] = {}
    for path in sorted(run.parent.glob(f"{run.name}.samples.*")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            noted.setdefault(row["step"], {})[row["rank"]] = row
    found = {}
    for step, rows in noted.items():
        size = rows[0]["size"]
        found[step] = sorted(key for rank in range(size) for key in rows[rank]["keys"])
    return found


def flip_in_newest(checkpoints: Path, draw: np.random.Generator) -> bool:
    """Flip a bit in a file of the newest checkpoint, where there are two; whether there were."""
    folders = sorted(checkpoints.glob("step_*"))
    if len(folders) < 2:
        return False
    files = sorted(folders[-1].iterdir())
    path = files[int(draw.integers(len(files)))]
    content = bytearray(path.read_bytes())
    content[int(draw.integers(len(content)))] ^= 1 << int(draw.integers(8))
    path.write_bytes(content)
    return True
