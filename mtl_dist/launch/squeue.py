"""What Slurm says about jobs: `squeue` for those that wait or run, `sacct` or `scontrol` for the others.

A cluster without accounting has no `sacct`; the controller then remembers a job for some minutes, and after
that only the run folder knows.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from mtl_dist.errors import UserError

FIELDS = "%i|%T|%r|%S|%N"

_JOBS_AT_ONCE = 500

PATIENCE_S = 60
"""How long a program of Slurm's may take to answer."""


LIVE_STATES = {
    *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"),
    *("RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"),
}
"""The states of a job that waits, runs or is ending."""


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


def cluster_name() -> str:
    """How the cluster is called that Slurm's programs here ask; nothing if it does not say."""
    for line in _output(["scontrol", "show", "config"]).splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "ClusterName":
            return value.strip()
    return ""


@dataclass(frozen=True)
class EndedJob:
    """A job that is no longer in the queue: `state` such as FAILED, `by` who cancelled it, `code` as 0:9."""

    state: str
    code: str = ""
    by: str = ""


def ended_jobs(job_ids: Collection[str]) -> dict[str, EndedJob]:
    """How jobs ended that are no longer in the queue; those that nobody remembers are missing."""
    if not job_ids:
        return {}
    numbers = sorted({job.partition("_")[0] for job in job_ids})
    accounting = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode"]
    found: dict[str, EndedJob] = {}
    for start in range(0, len(numbers), _JOBS_AT_ONCE):
        found |= parse_sacct(
            _output([*accounting, f"--jobs={','.join(numbers[start : start + _JOBS_AT_ONCE])}"])
        )
    if any(job not in found for job in job_ids):
        found = parse_scontrol(_output(["scontrol", "--oneliner", "show", "job"])) | found
    return {job: found[job] for job in job_ids if job in found}


def parse_sacct(text: str) -> dict[str, EndedJob]:
    """
    >>> parse_sacct("12_[0,2-3%2]|CANCELLED by 1000|0:0")["12_3"]
    EndedJob(state='CANCELLED', code='0:0', by='1000')
    """
    jobs = {}
    for line in text.splitlines():
        names, _, rest = line.partition("|")
        said, _, code = rest.partition("|")
        state, _, by = said.partition(" by ")
        for name in _tasks_of(names):
            jobs[name] = EndedJob(state.strip(), code, by)
    return jobs


def parse_scontrol(text: str) -> dict[str, EndedJob]:
    """
    >>> parse_scontrol("JobId=9 ArrayJobId=7 ArrayTaskId=1 JobState=TIMEOUT ExitCode=0:15")
    {'7_1': EndedJob(state='TIMEOUT', code='0:15', by='')}
    """
    jobs = {}
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        names = fields.get("JobId", "")
        if "ArrayTaskId" in fields:
            # The tasks that have not started are one job.
            tasks = fields["ArrayTaskId"]
            names = f"{fields['ArrayJobId']}_{tasks if tasks.isdecimal() else f'[{tasks}]'}"
        for name in _tasks_of(names):
            jobs[name] = EndedJob(fields.get("JobState", ""), fields.get("ExitCode", ""))
    return jobs


def _tasks_of(names: str) -> list[str]:
    """Each of an array's tasks: `12_[0,2-3%2]` is 12_0, 12_2 and 12_3; any other job is itself."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", names)
    if found is None:
        return [names]
    numbers: list[int] = []
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [f"{found[1]}_{number}" for number in numbers]


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
