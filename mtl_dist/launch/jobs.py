"""Runs seen from outside: where each stands, what it prints, and how to end it.

Three witnesses: the run folder (status.json, attempts.json, jobs.json), the queue, and Slurm's memory of jobs
that are gone. Only the first exists for a run that was started on this machine by hand.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from mtl_dist.errors import UserError
from mtl_dist.launch.attempts import Attempt, read_attempts
from mtl_dist.launch.records import JobRecord, read_jobs, write_jobs
from mtl_dist.launch.squeue import JobState, finished_job, live_jobs
from mtl_dist.run_folder import RunFolder
from mtl_dist.status import Status, read_status

ACTIVE = ("queued", "starting", "running", "stopping")
"""The states of a run that goes on without anybody's help."""


@dataclass(frozen=True)
class RunView:
    """One run as a person wants to see it.

    `state` is one of ACTIVE, or done, stopped, failed, cancelled, unknown; `detail` is why, or what it waits
    for; `requeues` counts the attempts that ended, by cause.
    """

    run: Path
    state: str
    detail: str
    job: str
    status: Status | None
    requeues: Mapping[str, int]


# -- where a run stands -----------------------------------------------------------------------------------


def find_runs(folder: Path) -> list[Path]:
    """The run folders at or below `folder`, by name."""
    if (folder / "recipe.yaml").is_file():
        return [folder]
    if not folder.is_dir():
        return []
    return [run for child in sorted(folder.iterdir()) if child.is_dir() for run in find_runs(child)]


def view_runs(runs: list[Path]) -> list[RunView]:
    """Where each run stands now; Slurm is asked once for all of them that it knows of."""
    live: Mapping[str, JobState] | str = {}
    if any(read_jobs(run) for run in runs):
        try:
            live = live_jobs()
        except UserError as error:
            live = str(error)
    return [view_run(run, live) for run in runs]


def view_run(run: Path, live: Mapping[str, JobState] | str) -> RunView:
    """Where one run stands, given the user's jobs that wait or run, or why they are not known."""
    status = read_status(run)
    attempts = read_attempts(run)
    job = next((job for job in reversed(read_jobs(run)) if job.kind == "train"), None)
    if job is None:
        state, detail = _local_state(status)
    elif isinstance(live, str):
        state, detail = _said_state(status, live)
    elif job.id in live:
        state, detail = _live_state(live[job.id], status, attempts)
    else:
        state, detail = _ended_state(job, status)
    job_id = job.id if job is not None else ""
    causes = [attempt.cause for attempt in attempts if attempt.job_id == job_id]
    if state not in ("queued", "starting", "running"):
        causes = causes[:-1]  # Nothing was requeued after the attempt that ended the run.
    requeues = Counter[str](cause for cause in causes if cause != "running")
    return RunView(run, state, detail, job_id, status, requeues)


def _live_state(job: JobState, status: Status | None, attempts: list[Attempt]) -> tuple[str, str]:
    """The state of a run whose job is in the queue."""
    if job.state == "PENDING":
        since = f", expected {job.start}" if job.start else ""
        return "queued", f"{job.reason}{since}"
    if job.state == "COMPLETING":
        return "stopping", status.reason if status is not None else ""
    if job.state != "RUNNING":
        return "starting", job.state.lower()
    begun = attempts[-1].started if attempts and attempts[-1].cause == "running" else None
    if status is None or begun is None or status.updated < begun:
        return "starting", f"on {job.nodes}"
    return ("stopping" if status.state != "running" else "running"), f"on {job.nodes}"


def _said_state(status: Status | None, why: str) -> tuple[str, str]:
    """The state that a run on a cluster has reported last, where the cluster can't be asked."""
    if status is None:
        return "unknown", why
    said = f"as it said {_ago(time.time() - status.updated)} ago; {why}"
    if status.state == "stopped":
        return "unknown", f"stopped, {said}"  # It may be in the queue again by now.
    return status.state, said


def _ended_state(job: JobRecord, status: Status | None) -> tuple[str, str]:
    """The state of a run whose job has left the queue."""
    if status is not None and status.state in ("done", "failed"):
        return status.state, _last_line(status.reason)
    if job.cancelled is not None:
        return "cancelled", "by mtl cancel"
    slurm = finished_job(job.id)
    if slurm == "CANCELLED":
        return "cancelled", ""
    if status is not None and status.state == "stopped":
        return "stopped", _last_line(status.reason)
    return "failed", f"the job ended as {slurm or 'nobody knows what'}; see mtl logs"


def _local_state(status: Status | None) -> tuple[str, str]:
    """The state of a run that was started by hand."""
    if status is None:
        return "unknown", "it has not said anything yet"
    if status.state != "running":
        return status.state, _last_line(status.reason)
    if status.host != platform.node():
        return "running", f"on {status.host}, as it said {_ago(time.time() - status.updated)} ago"
    if not is_alive(status):
        return "failed", "its process is gone"
    return "running", f"process {status.pid}"


def is_alive(status: Status) -> bool:
    """Whether the process that wrote the status still runs here; a later one of the same number is not it."""
    try:
        return bool(psutil.Process(status.pid).create_time() <= status.updated)
    except psutil.NoSuchProcess:
        return False


def _last_line(text: str) -> str:
    return text.strip().rsplit("\n", 1)[-1]


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


# -- what it prints ---------------------------------------------------------------------------------------


def log_path(run: Path, rank: int | None) -> Path:
    """The file with a run's output: a rank's own on a cluster, log.txt of a run that was started by hand.

    Raises:
        UserError: no such run, rank or log.
    """
    RunFolder.open(run)
    jobs = [job for job in read_jobs(run) if job.kind == "train"]
    if not jobs:
        if rank is not None:
            raise UserError(f"--rank: expected a run on a cluster, found {run}, whose ranks share log.txt.")
        path = run / "log.txt"
    else:
        path = run / jobs[-1].submission / "jobs" / f"{jobs[-1].id}_{rank or 0}_log.out"
        path = Path(os.path.normpath(path))
    if path.exists():
        return path
    ranks = _ranks_of(run, jobs[-1]) if jobs else 0
    if rank is not None and rank >= ranks:
        raise UserError(f"--rank: expected 0 to {ranks - 1}, found {rank}.")
    view = view_runs([run])[0]
    why = f" ({view.detail})" if view.detail else ""
    raise UserError(f"{run}: nothing has been printed yet; it is {view.state}{why}.")


def _ranks_of(run: Path, job: JobRecord) -> int:
    facts = json.loads((run / job.submission / "submission.json").read_text(encoding="utf-8"))
    return int(facts["nodes"] * facts["tasks_per_node"])


def follow(path: Path, ended: Callable[[], bool], poll_s: float = 0.5) -> Iterator[str]:
    """What is in the file, and what is appended to it until `ended`."""
    with open(path, encoding="utf-8", errors="replace") as file:
        while True:
            # Asked before reading: what was written until then is read once more.
            over = ended()
            while text := file.read(1 << 16):
                yield text
            if over:
                return
            time.sleep(poll_s)


def has_ended(run: Path) -> bool:
    """Whether nothing more will come from this run by itself; as long as Slurm can't be asked, it may."""
    view = view_runs([run])[0]
    return view.state not in ACTIVE and not (view.job and view.state == "unknown")


# -- how to end it ----------------------------------------------------------------------------------------


def cancel(run: Path) -> str:
    """Ends a run and whatever was chained to it; it saves first. Says what was done.

    Raises:
        UserError: there is nothing to end here.
    """
    jobs = read_jobs(run)
    if not jobs:
        return _cancel_local(run)
    live = live_jobs()
    ending = [job.id for job in jobs if job.id in live]
    if not ending:
        raise UserError(f"{run}: expected a job that waits or runs, found none. See mtl status {run}.")
    # Marked first, so that nobody finds a cancelled run that looks lost.
    write_jobs(run, [replace(job, cancelled=time.time()) if job.id in ending else job for job in jobs])
    result = subprocess.run(["scancel", *ending], capture_output=True, text=True, timeout=60, check=False)
    if result.returncode != 0:
        raise UserError(f"scancel: {result.stderr.strip()}")
    return f"cancelled job {', '.join(ending)}"


def _cancel_local(run: Path) -> str:
    status = read_status(run)
    if status is None or status.state != "running":
        raise UserError(f"{run}: expected a run that is running, found {status.state if status else 'none'}.")
    if status.host != platform.node():
        raise UserError(f"{run}: it runs on {status.host}. Run mtl cancel there.")
    if not is_alive(status):
        raise UserError(f"{run}: its process is gone already.")
    os.kill(status.pid, signal.SIGTERM)
    return f"asked process {status.pid} to save and stop"
