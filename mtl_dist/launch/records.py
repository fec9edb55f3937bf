"""What a run's folder knows of its Slurm jobs: `jobs.json`, and the `submission.json` of each submission."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.json_files import DamagedFile, read_json

Kind = Literal["train", "evaluate"]


@dataclass(frozen=True)
class JobRecord:
    """One Slurm job of a run: `id` is `12`, or `12_3` in an array; `submission` is relative to the run.

    `cluster` is the name of the job's cluster, if Slurm said it: another one may have a job of that number.
    `again` is true of a job that `mtl status` submitted because the one before had been lost.
    """

    id: str
    kind: Kind
    submission: str
    submitted: float = field(default_factory=time.time)
    cancelled: float | None = None
    cluster: str = ""
    again: bool = False


@dataclass(frozen=True)
class Submission:
    """What was asked for at a submission.

    runs               the run folders of the job's array tasks, relative to the submission's folder
    requeue, profile   the cluster profile's settings
    modules            the user's modules in the snapshot, each with its hash
    working_directory  where `mtl submit` was started
    """

    nodes: int
    tasks_per_node: int
    runs: list[str] = field(default_factory=list)
    requeue: dict[str, int] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    name: str = "mtl-run"
    working_directory: str = ""
    data_moved: bool = False


def read_jobs(run: Path) -> list[JobRecord]:
    """The Slurm jobs of a run, oldest first; none for a run that was started in another way.

    Raises:
        UserError: jobs.json is damaged.
    """
    path = run / "jobs.json"
    try:
        return read_json(list[JobRecord], path) or []
    except DamagedFile as error:
        raise UserError(
            f"{path}: expected the run's jobs, found a damaged file ({error}). Look for them with squeue and "
            "remove the file."
        ) from None


def write_jobs(run: Path, jobs: Sequence[JobRecord]) -> None:
    write_text(run / "jobs.json", json.dumps([asdict(job) for job in jobs], indent=1))


def record_jobs(
    runs: Sequence[Path],
    job_ids: Sequence[str],
    kind: Kind,
    folder: Path,
    cluster: str,
    *,
    again: bool = False,
) -> None:
    """Add to each run the job that it was given; `folder` is that of the submission."""
    for run, job_id in zip(runs, job_ids, strict=True):
        record = JobRecord(job_id, kind, os.path.relpath(folder, run), cluster=cluster, again=again)
        write_jobs(run, [*read_jobs(run), record])


def write_submission(folder: Path, submission: Submission) -> None:
    write_text(folder / "submission.json", json.dumps(asdict(submission), indent=1))


def read_submission(folder: Path) -> Submission:
    """What was asked for at the submission in `folder`.

    Raises:
        UserError: submission.json is missing or damaged.
    """
    path = folder / "submission.json"
    try:
        found = read_json(Submission, path)
    except DamagedFile as error:
        raise UserError(
            f"{path}: expected a submission, found a damaged file ({error}). Submit again."
        ) from None
    if found is None:
        raise UserError(f"{path}: expected a submission, found no such file. Submit the run again.")
    return found
