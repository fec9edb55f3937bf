"""The Slurm jobs of a run: `jobs.json` in its folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from mtl_dist.durable import write_text

Kind = Literal["train", "evaluate"]


@dataclass(frozen=True)
class JobRecord:
    """One Slurm job of a run: `id` is `12`, or `12_3` in an array; `submission` is relative to the run."""

    id: str
    kind: Kind
    submission: str
    submitted: float = field(default_factory=time.time)
    cancelled: float | None = None


def read_jobs(run: Path) -> list[JobRecord]:
    """The Slurm jobs of a run, oldest first; none for a run that was started in another way."""
    try:
        return [JobRecord(**entry) for entry in json.loads((run / "jobs.json").read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []


def write_jobs(run: Path, jobs: Sequence[JobRecord]) -> None:
    write_text(run / "jobs.json", json.dumps([asdict(job) for job in jobs], indent=1))


def record_jobs(runs: Sequence[Path], job_ids: Sequence[str], kind: Kind, folder: Path) -> None:
    for run, job_id in zip(runs, job_ids, strict=True):
        write_jobs(run, [*read_jobs(run), JobRecord(job_id, kind, os.path.relpath(folder, run))])
