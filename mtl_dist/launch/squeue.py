"""What Slurm says about jobs: `squeue` for those that wait or run, `sacct` or `scontrol` for the others.

A cluster without accounting has no `sacct`; the controller then remembers a job for some minutes, and after
that only the run folder knows.
"""

from __future__ import annotations

import getpass
import shutil
import subprocess
from dataclasses import dataclass

from mtl_dist.errors import UserError

FIELDS = "%i|%T|%r|%S|%N"

PATIENCE_S = 60
"""How long a program of Slurm's may take to answer."""


@dataclass(frozen=True)
class JobState:
    """One job as Slurm sees it: `state` such as PENDING; `reason` why it waits; `nodes` where it runs."""

    state: str
    reason: str = ""
    start: str = ""
    nodes: str = ""


def live_jobs() -> dict[str, JobState]:
    """All of the user's jobs that wait, run or are ending, by job id.

    Raises:
        UserError: there is no Slurm here, or it does not answer.
    """
    if shutil.which("squeue") is None:
        raise UserError("squeue: no Slurm on this machine. Ask on a login node of the cluster.")
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", f"--format={FIELDS}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"squeue: {_last_line(error.stderr)}. Is the controller up, and SLURM_CONF right?"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"squeue: no answer in {PATIENCE_S} s. Is the controller up?") from None
    return parse_squeue(result.stdout)


def parse_squeue(text: str) -> dict[str, JobState]:
    """
    >>> parse_squeue("12_3|PENDING|Priority|2026-01-01T10:00:00|")["12_3"].reason
    'Priority'
    """
    jobs = {}
    for line in text.splitlines():
        job, state, reason, start, nodes = line.split("|")
        jobs[job] = JobState(
            state, "" if reason == "None" else reason, "" if start == "N/A" else start, nodes
        )
    return jobs


def finished_job(job_id: str) -> str:
    """The final state of a job that is no longer in the queue, such as FAILED; nothing if nobody knows."""
    accounting = _output(
        ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State"]
    )
    if accounting.strip():
        return accounting.split()[0]  # "CANCELLED by 1000"
    for word in _output(["scontrol", "--oneliner", "show", "job", job_id]).split():
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    return ""


def _output(command: list[str]) -> str:
    """What a Slurm command prints; nothing where it is not installed, does not know the job or answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False).stdout
    except subprocess.TimeoutExpired:
        return ""


def _last_line(text: str) -> str:
    return text.strip().rsplit("\n", 1)[-1]
