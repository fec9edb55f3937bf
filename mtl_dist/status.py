"""Where a run stands, in one small file that anybody may read: `status.json` in the run folder.

Rank 0 of the training writes it; `mtl status` and the launchers read it, from any machine that sees the
folder, while the run is queued, running or gone.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from mtl_dist.durable import write_text
from mtl_dist.json_files import DamagedFile, read_json

State = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Status:
    """One moment of a run.

    state         `stopped`: it saved and left because it was asked to, and can go on from there
    step          completed optimizer steps, of `total_steps`
    epoch         as the data defines it, with its fraction
    position      global samples consumed, of `end_position`
    images_per_s  over all ranks
    metric, best  the monitored metric and its best value so far
    saved         the step of the newest checkpoint that was written; 0 before there is one
    reason        why it stopped or failed; the last line says it all
    retry         false if starting again can't help: the user has something to fix
    updated       seconds since 1970; `host` and `pid` are those of rank 0
    """

    state: State
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    position: int = 0
    end_position: int = 0
    images_per_s: float = 0.0
    metric: str = ""
    best: float | None = None
    saved: int = 0
    reason: str = ""
    retry: bool = True
    updated: float = field(default_factory=time.time)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)

    @property
    def seconds_left(self) -> float | None:
        """The time to the end of the plan at the current speed; None while no speed is known."""
        return (self.end_position - self.position) / self.images_per_s if self.images_per_s > 0 else None


def write_status(run: Path, status: Status) -> None:
    """Replaces the run's status in one step.

    Not synced to the disk: it is written often, and after a power cut a run is known by its checkpoints.
    """
    write_text(run / "status.json", json.dumps(asdict(status)), sync=False, shared=True)


def write_last_status(run: Path, status: Status) -> None:
    """The same; on a full disk over the old one, which has its place there already.

    A reader may see half of it for a moment, but a run that has failed never looks as if it were running.
    """
    try:
        write_status(run, status)
    except OSError:
        with open(run / "status.json", "r+b", buffering=0) as file:
            file.write(json.dumps(asdict(status)).encode())
            file.truncate()


def read_status(run: Path) -> Status | None:
    """The run's last status; None if it never wrote one. One that is damaged says so, as its reason."""
    try:
        return read_json(Status, run / "status.json")
    except DamagedFile as error:
        return Status("failed", reason=f"status.json is damaged ({error}); the next start rewrites it")
