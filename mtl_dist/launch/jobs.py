"""Runs seen from outside: where each stands, what it prints, and how to end it.

Three witnesses: the run folder (status.json, attempts.json, jobs.json), the queue, and Slurm's memory of jobs
that are gone. Only the first exists for a run that was started on this machine by hand.
"""

from __future__ import annotations

import os
import platform
import pwd
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from mtl_dist.errors import UserError
from mtl_dist.launch.attempts import Attempt, Cause, read_attempts
from mtl_dist.launch.records import JobRecord, read_jobs, read_submission, write_jobs
from mtl_dist.launch.squeue import LIVE_STATES, EndedJob, JobState, cluster_name, ended_jobs, live_jobs
from mtl_dist.status import Status, read_status

ACTIVE = ("queued", "starting", "running", "stopping")
"""The states of a run that goes on without anybody's help."""

_GOES_ON = ("time limit", "preemption", "node failure", "crash")
"""After what a run would have been started again."""

_TAIL = 20_000
_TELLING = re.compile(
    r"setup failed: |command not found|No such file or directory|Permission denied|ModuleNotFoundError|"
    r"cannot execute|FATAL|^srun: fatal|^slurmstepd: error: execve"
)
"""What a log says of why a job's ranks have not begun."""


@dataclass(frozen=True)
class RunView:
    """One run as a person wants to see it.

    `state` is one of ACTIVE, or done, stopped, failed, cancelled, unknown; `detail` is why, or what it waits
    for; `requeues` counts the attempts that ended, by cause. `lost` is why the job is gone, if nobody was
    left to requeue it. `updated`: the last that was heard of it, seconds since 1970.
    """

    run: Path
    state: str
    detail: str
    job: str
    status: Status | None
    requeues: Mapping[str, int]
    lost: Cause | None = None
    updated: float = 0.0


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
    traces = [Trace.of(run) for run in runs]
    jobs = [trace.job for trace in traces if trace.job is not None]
    queue = Queue()
    if jobs:
        try:
            live = live_jobs()
            # Only a job's own cluster knows how it ended.
            cluster = cluster_name() if any(job.cluster for job in jobs) else ""
            queue = Queue(live, cluster=cluster)
            gone = [job.id for trace in traces if (job := trace.job) and trace.is_open and queue.is_gone(job)]
            ended = ended_jobs(gone)
            # squeue was asked for one's own jobs; those of others may be seen here, too.
            others = {
                job: JobState(found.state) for job, found in ended.items() if found.state in LIVE_STATES
            }
            queue = Queue({**live, **others}, ended, cluster)
        except UserError as error:
            queue = Queue(problem=str(error))
    return [_view(trace, queue) for trace in traces]


@dataclass(frozen=True)
class Queue:
    """What Slurm says: the user's jobs that wait or run, those that are gone; or why it says nothing."""

    live: Mapping[str, JobState] = field(default_factory=dict)
    ended: Mapping[str, EndedJob] = field(default_factory=dict)
    cluster: str = ""
    problem: str = ""

    def is_here(self, job: JobRecord) -> bool:
        """Whether this is the job's cluster, as far as is known."""
        return not job.cluster or not self.cluster or job.cluster == self.cluster

    def is_gone(self, job: JobRecord) -> bool:
        return self.is_here(job) and job.id not in self.live


@dataclass(frozen=True)
class Trace:
    """What a run's folder says: its status, its attempts, its newest job; or what is damaged."""

    run: Path
    status: Status | None = None
    attempts: list[Attempt] = field(default_factory=list)
    job: JobRecord | None = None
    damage: str = ""

    @classmethod
    def of(cls, run: Path) -> Trace:
        status = read_status(run)
        try:
            job = next((job for job in reversed(read_jobs(run)) if job.kind == "train"), None)
            return cls(run, status, read_attempts(run) if job is not None else [], job)
        except UserError as error:
            return cls(run, status, damage=str(error))

    @property
    def own(self) -> list[Attempt]:
        """The attempts of the newest job."""
        return [a for a in self.attempts if self.job is not None and a.job_id == self.job.id]

    @property
    def said(self) -> Status | None:
        """The status, if it is of the newest job, or says that the run is done."""
        if self.status is None or self.job is None or self.own or self.status.state == "done":
            return self.status
        return self.status if self.status.updated >= self.job.submitted else None

    @property
    def is_open(self) -> bool:
        """Whether nobody has said how the newest job ended."""
        ended = self.said is not None and self.said.state in ("done", "failed")
        return self.job is not None and self.job.cancelled is None and not ended


def _view(trace: Trace, queue: Queue) -> RunView:
    """Where one run stands."""
    run, status, job = trace.run, trace.status, trace.job
    lost: Cause | None = None
    if trace.damage:
        state, detail = "unknown", trace.damage
    elif job is None:
        state, detail = _local_state(status)
    elif queue.problem or not queue.is_here(job):
        state, detail = _said_state(status, queue.problem or _elsewhere(job, queue.cluster))
    elif job.id in queue.live:
        state, detail = _live_state(queue.live[job.id], status, trace.attempts)
    else:
        state, detail, lost = _ended_state(trace, job, queue.ended.get(job.id))
    causes = [attempt.cause for attempt in trace.own]
    if state not in ("queued", "starting", "running"):
        causes = causes[:-1]  # Nothing was requeued after the attempt that ended the run.
    requeues = Counter[str](cause for cause in causes if cause != "running")
    heard = max(status.updated if status is not None else 0.0, job.submitted if job is not None else 0.0)
    return RunView(run, state, detail, job.id if job is not None else "", status, requeues, lost, heard)


def _elsewhere(job: JobRecord, cluster: str) -> str:
    return f"its job is on the cluster {job.cluster}, and this is {cluster}: ask there"


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


def _ended_state(trace: Trace, job: JobRecord, slurm: EndedJob | None) -> tuple[str, str, Cause | None]:
    """The state of a run whose job has left the queue, and why it is lost, if it is."""
    status = trace.said
    if status is not None and status.state in ("done", "failed"):
        return status.state, _last_line(status.reason), None
    waited = "" if trace.own else " while it waited"
    if job.cancelled is not None:
        return "cancelled", f"by mtl cancel{waited}", None
    if slurm is not None and slurm.state == "CANCELLED":
        return "cancelled", f"by {_user(slurm.by)}{waited}" if slurm.by else waited.strip(), None
    newest = trace.own[-1] if trace.own else None
    if newest is None and (status is None or status.state != "stopped"):
        words = _last_words(trace.run, job)
        if slurm is None and not words:
            return "failed", "the job left the queue before it started, and Slurm has forgotten why", None
        return "failed", f"{why_lost(slurm, began=False)[1]}: {words or 'it printed nothing'}", None
    if newest is None:
        return "stopped", _last_line(status.reason if status is not None else ""), None
    # One whose verdict was given should have been requeued after it.
    cause, reason = (
        why_lost(slurm, began=True) if newest.cause == "running" else (newest.cause, newest.reason)
    )
    lost = cause if cause in _GOES_ON else None
    if status is not None and status.state == "stopped":
        said = _last_line(status.reason)
        return "stopped", f"{said}; {reason}" if newest.cause == "running" else said, lost
    return "failed", _last_line(reason), lost


def why_lost(slurm: EndedJob | None, *, began: bool) -> tuple[Cause, str]:
    """Why a job ended whose batch script gave no verdict, from what Slurm says of it."""
    state = slurm.state if slurm is not None else ""
    if not began:
        code = f" with exit code {slurm.code}" if slurm is not None and slurm.code else ""
        return "crash", f"the job ended as {state or 'nobody knows what'}{code} before its ranks had begun"
    if state == "TIMEOUT":
        return (
            "time limit",
            "Slurm ended the job at its time limit before its script had: did the ranks hang?",
        )
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return "node failure", f"a node of the job was lost ({state})"
    if state in ("PREEMPTED", "REVOKED"):
        return "preemption", f"Slurm evicted the job ({state}), before the ranks had saved"
    if state == "OUT_OF_MEMORY":
        return "crash", "Slurm ended the job: it was out of memory. Raise memory_gb, or lower data.workers"
    if not state:
        return "node failure", "the job is gone, and Slurm has forgotten how it ended"
    code = f" with exit code {slurm.code}" if slurm is not None and slurm.code else ""
    return "crash", f"the job ended as {state}{code}, and its batch script said nothing: was it killed?"


def _last_words(run: Path, job: JobRecord) -> str:
    """The last line that a job has printed; that of a failing setup counts more than what comes after."""
    path = run / job.submission / "jobs" / f"{job.id}_0_log.out"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    return (telling or lines or [""])[0 if telling else -1]


def _user(number: str) -> str:
    with suppress(KeyError, ValueError):
        return pwd.getpwuid(int(number)).pw_name
    return f"user {number}"


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
    from mtl_dist.run_folder import RunFolder  # NumPy, for which `mtl status` need not wait

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
    asked = read_submission(run / job.submission)
    return asked.nodes * asked.tasks_per_node


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
    cluster = cluster_name()
    here = [job for job in jobs if job.cluster in ("", cluster)]
    if not here:
        found = cluster or "one that does not say its name"
        raise UserError(
            f"{run}: expected the cluster {jobs[-1].cluster}, where its job {jobs[-1].id} is, found {found}. "
            "Run mtl cancel there."
        )
    live = live_jobs()
    ending = [job.id for job in here if job.id in live]
    if not ending:
        raise UserError(f"{run}: expected a job that waits or runs, found none. See mtl status {run}.")
    # Marked first, so that nobody finds a cancelled run that looks lost.
    cancelled = {id(job) for job in here if job.id in live}
    write_jobs(run, [replace(job, cancelled=time.time()) if id(job) in cancelled else job for job in jobs])
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
