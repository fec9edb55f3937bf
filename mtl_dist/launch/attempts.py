"""The attempts of one run on a cluster: why each ended, and whether another one follows.

A run on Slurm is one job that may start many times. Rank 0 opens an attempt when it starts. When the ranks
have ended, the batch script asks here for the verdict (`python -m mtl_dist.launch.attempts`; exit code 0:
requeue). It is the batch script that requeues because it runs once, outlives its ranks, also those killed
with SIGKILL, and is outside of any container, where `scontrol` is. An attempt that nobody closed was lost:
the next start closes it, or the next look (look.py), if there is none.

Retries are counted by cause, so that a run which is preempted every hour keeps its budget for real crashes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mtl_dist.durable import unwritable, write_text
from mtl_dist.errors import UserError
from mtl_dist.json_files import DamagedFile, read_json
from mtl_dist.launch.profile import ClusterProfile
from mtl_dist.launch.records import Submission, read_submission
from mtl_dist.printable import say
from mtl_dist.status import Status, read_status, write_status
from mtl_dist.stopping import TIME_LIMIT

Cause = Literal["running", "done", "asked", "time limit", "preemption", "node failure", "crash", "mistake"]
"""Why an attempt ended. `asked`: a person interrupted it (SIGINT). `mistake`: the user can fix it."""


STARTED = "the ranks start"
"""The batch script prints this before it starts the ranks; its output is appended to, attempt by attempt."""

_LOST = re.compile(
    r"^srun: error: (?:Node failure on (\S+)|Task launch for \S+ failed on node ([^\s:]+))", re.MULTILINE
)
_SLURMS_SIGNAL = f"signal {signal.SIGUSR2.name}"
_EARLY_S = 60
"""So much earlier than asked for Slurm may send its signal."""

_SRUN_SAYS = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<ranks>\S+): (?P<how>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Attempt:
    """One start of a run: `first_step` is where the run stood then, `last_step` where it stood at the end."""

    job_id: str
    nodes: int
    ranks: int
    started: float
    first_step: int
    cause: Cause = "running"
    ended: float | None = None
    last_step: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Ending:
    """What is known when a step has ended."""

    job_id: str
    exit_code: int
    job_state: str
    """The job's state as Slurm says: anything but RUNNING means that Slurm itself is ending it."""
    at_limit: bool = False
    """Whether Slurm is ending it at its time limit."""
    killed: str = ""
    """The first rank that a signal killed, as srun says; nothing if the first one to end did so by itself."""
    lost: str = ""
    """A node that does not answer any more, as srun says."""
    limit_from: float = math.inf
    """From then on Slurm's signal (SIGUSR2) says that the time limit is near; before it was a preemption."""


@dataclass(frozen=True)
class Budget:
    """How often a run is started again after a crash, after the loss of a node, and without a single step.

    `resubmit`: how often a run whose job is lost is submitted again by whoever looks.
    """

    crashes: int
    node_failures: int
    without_step: int = 5
    resubmit: int = 0


@dataclass(frozen=True)
class Failure:
    """The first error of an attempt, from whichever rank wrote it first; later ones are its echoes."""

    rank: int
    reason: str
    mistake: bool


# -- the record -------------------------------------------------------------------------------------------


def read_attempts(run: Path) -> list[Attempt]:
    """All attempts of a run so far, oldest first.

    Raises:
        UserError: attempts.json is damaged.
    """
    path = run / "attempts.json"
    try:
        return read_json(list[Attempt], path) or []
    except DamagedFile as error:
        raise UserError(
            f"{path}: expected the run's attempts, found a damaged file ({error}). Remove it: the counts of "
            "crashes begin again."
        ) from None


def begin_attempt(run: Path, attempt: Attempt, budget: Budget) -> None:
    """Opens an attempt; one that was left open is closed as lost with its node.

    Raises:
        UserError: the run was lost so too often, or started too often in vain.
    """
    attempts = read_attempts(run)
    if attempts and attempts[-1].cause == "running":
        attempts[-1] = _lost(attempts[-1], read_status(run))
    _write_attempts(run, [*attempts, attempt])
    (run / "failure.json").unlink(missing_ok=True)
    # Slurm requeues by itself what it has ended itself, without asking for a verdict.
    in_vain = _without_step([a for a in attempts if a.job_id == attempt.job_id], budget)
    if in_vain:
        raise UserError(f"{run}: {in_vain} Look at the reasons in attempts.json, then submit it again.")
    lost = count_of("node failure", attempts, attempt.job_id)
    if lost > budget.node_failures:
        raise UserError(
            f"{run}: the nodes of {lost} attempts failed, more than requeue.node_failures "
            f"({budget.node_failures}). Look at the nodes' state, then submit the run folder again."
        )


def _lost(attempt: Attempt, status: Status | None) -> Attempt:
    """How an attempt ended that nobody closed: it saved and left, or it was killed in the middle."""
    step = status.step if status is not None else attempt.first_step
    if status is not None and status.state == "stopped":
        return replace(attempt, cause=_cause_of_stop(status), last_step=step, reason=status.reason)
    return replace(attempt, cause="node failure", last_step=step, reason="the node or the job was lost")


def close_lost(run: Path, job_id: str, cause: Cause, reason: str) -> Sequence[Attempt]:
    """Closes the attempt of a job that is gone, whose verdict nobody gave; returns all attempts."""
    attempts = read_attempts(run)
    if not attempts or attempts[-1].job_id != job_id:
        attempts.append(Attempt(job_id, 0, 0, time.time(), attempts[-1].last_step if attempts else 0))
    if attempts[-1].cause == "running":
        status = read_status(run)
        step = status.step if status is not None else attempts[-1].first_step
        attempts[-1] = replace(attempts[-1], cause=cause, reason=reason, ended=time.time(), last_step=step)
        _write_attempts(run, attempts)
    return attempts


def record_failure(run: Path, rank: int, error: BaseException) -> None:
    """Writes down a rank's error, unless another rank was first, or another job trains in the folder."""
    newest = read_attempts(run)[-1:]
    job = job_of_task(os.environ) if "SLURM_JOB_ID" in os.environ else ""
    if job and any(attempt.cause == "running" and attempt.job_id != job for attempt in newest):
        return
    reason = "\n".join(traceback.format_exception_only(error)).strip()
    text = json.dumps(asdict(Failure(rank, reason, mistake=isinstance(error, UserError))))
    temporary = run / f".failure-{rank}.json"
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, run / "failure.json")  # atomic, and fails if somebody was first
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _read_failure(run: Path) -> Failure | None:
    try:
        return Failure(**json.loads((run / "failure.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _write_attempts(run: Path, attempts: Sequence[Attempt]) -> None:
    write_text(run / "attempts.json", json.dumps([asdict(attempt) for attempt in attempts], indent=1))


# -- the verdict ------------------------------------------------------------------------------------------


def finish_attempt(run: Path, ending: Ending, budget: Budget) -> bool:
    """Closes the open attempt and says whether the job is to be requeued.

    If not, and the run is not done, its status says `failed` and why.
    """
    attempts = read_attempts(run)
    if not attempts or attempts[-1].cause != "running":
        # The ranks ended before the first of them could open an attempt.
        step = attempts[-1].last_step if attempts else 0
        attempts.append(Attempt(ending.job_id, 0, 0, time.time(), step))
    status = read_status(run)
    # A status from before this attempt says where the run stands, but not how this attempt ended.
    fresh = status if status is not None and status.updated >= attempts[-1].started else None
    cause, reason = judge(ending, fresh, _read_failure(run), began=attempts[-1].ranks > 0)
    step = status.step if status is not None else attempts[-1].first_step
    attempts[-1] = replace(attempts[-1], cause=cause, reason=reason, ended=time.time(), last_step=step)
    _write_attempts(run, attempts)
    if cause in ("done", "asked"):
        return False
    hopeless = why_not_again(attempts, budget)
    if hopeless:
        failed = replace(
            status or Status("failed"), state="failed", retry=cause != "mistake", updated=time.time()
        )
        write_status(run, replace(failed, reason="\n".join(dict.fromkeys([hopeless, reason]))))
    return not hopeless and ending.job_state == "RUNNING"


def judge(
    ending: Ending, status: Status | None, failure: Failure | None, *, began: bool
) -> tuple[Cause, str]:
    """The cause of an ending, and its reason in words; `status` and `failure` are those of this attempt.

    What the run wrote last counts more than the exit code: after it was done, or had saved and stopped, a
    process that dies while it cleans up changes nothing.
    """
    if status is not None and status.state == "done":
        return "done", status.reason
    if status is not None and status.state == "stopped":
        ahead = status.reason == _SLURMS_SIGNAL and status.updated >= ending.limit_from
        if (ahead or ending.at_limit) and _cause_of_stop(status) == "preemption":
            return "time limit", f"{status.reason}, {'at' if ending.at_limit else 'ahead of'} the time limit"
        return _cause_of_stop(status), status.reason
    if failure is not None and failure.mistake:
        return "mistake", failure.reason
    if ending.lost:
        return "node failure", f"{ending.lost} does not answer"
    if ending.job_state != "RUNNING":
        return "node failure", f"Slurm ended the job (it is {ending.job_state or 'gone'})"
    if ending.killed and "Terminated" not in ending.killed and "User defined" not in ending.killed:
        return "crash", ending.killed + (" (out of memory?)" if ending.killed.endswith("Killed") else "")
    if failure is not None:
        return "crash", f"rank {failure.rank}: {failure.reason}"
    if status is not None and status.state == "failed":
        return "crash", status.reason  # a rank that hung was ended where nothing could be raised
    if ending.killed and not began:
        return "preemption", f"{ending.killed} before the run could handle a signal"
    return "crash", f"the ranks ended with exit code {ending.exit_code} and left no reason"


def why_not_again(attempts: Sequence[Attempt], budget: Budget) -> str:
    """Why another attempt would be in vain; nothing if it would not."""
    last = attempts[-1]
    before = attempts[-2] if len(attempts) > 1 else None
    if last.cause == "mistake":
        return last.reason
    if last.cause == "crash":
        if (
            before
            and before.cause == "crash"
            and (before.last_step, before.reason) == (last.last_step, last.reason)
        ):
            return f"It failed twice in the same way at step {last.last_step}: not started again."
        crashes = count_of("crash", attempts, last.job_id)
        if crashes > budget.crashes:
            return f"It crashed {crashes} times, more than requeue.crashes ({budget.crashes})."
    made_no_step = [a.cause == "time limit" and a.last_step <= a.first_step for a in attempts[-2:]]
    if made_no_step == [True, True]:
        return "Two attempts reached the time limit without a single step: raise time_limit."
    in_vain = _without_step([a for a in attempts if a.job_id == last.job_id], budget)
    if in_vain:
        return in_vain
    if [attempt.ranks for attempt in attempts[-3:]] == [0, 0, 0]:
        return "Three attempts ended before they had begun: look at the batch script's setup."
    return ""


def _without_step(own: Sequence[Attempt], budget: Budget) -> str:
    """What to say if too many of a job's attempts, the newest, ended without a single step."""
    newest = own[-budget.without_step :]
    if len(newest) < budget.without_step or any(a.last_step > a.first_step for a in newest):
        return ""
    causes = ", ".join(dict.fromkeys(a.cause for a in newest))
    return (
        f"{len(newest)} attempts in a row ended without a single step ({causes}), which requeue.without_step "
        "bounds."
    )


def count_of(cause: Cause, attempts: Sequence[Attempt], job_id: str) -> int:
    """How many attempts of one job ended so. Whoever submits the run again has a new budget."""
    return sum(attempt.cause == cause and attempt.job_id == job_id for attempt in attempts)


def _cause_of_stop(status: Status) -> Cause:
    if status.reason == TIME_LIMIT:
        return "time limit"
    return "asked" if status.reason == f"signal {signal.SIGINT.name}" else "preemption"


def first_killed(log: str) -> str:
    """What srun says in the batch script's output of the first rank to end, if a signal killed it.

    >>> first_killed("srun: error: node2: task 2: Killed")
    'rank 2 on node2: Killed'
    """
    this_attempt = log.rpartition(STARTED)[2]
    first = _SRUN_SAYS.search(this_attempt)
    if first is None or first["how"].startswith("Exited"):
        return ""
    return f"rank {first['ranks']} on {first['node']}: {first['how']}"


def lost_node(log: str) -> str:
    """What srun says in the batch script's output of a node that it cannot reach.

    >>> lost_node("srun: error: Task launch for StepId=7.1 failed on node n2: Communication failure")
    'n2'
    """
    found = _LOST.search(log.rpartition(STARTED)[2])
    return (found[1] or found[2]) if found is not None else ""


# -- the batch script's way in ----------------------------------------------------------------------------


def run_of_task(submission: Path, environ: Mapping[str, str]) -> Path:
    """The run folder of this job, or of this task of a job array."""
    run = read_submission(submission).runs[int(environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    return Path(os.path.normpath(submission / run))


def job_of_task(environ: Mapping[str, str]) -> str:
    """The job's id as users and submitit write it: `12`, or `12_3` in an array."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def limit_from(environ: Mapping[str, str], submission: Submission) -> float:
    """When Slurm begins to warn of the job's end; never where nobody knows the end."""
    end = environ.get("MTL_END_TIME")
    lead = submission.profile.get("signal_lead_s", ClusterProfile().signal_lead_s)
    return float(end) - lead - _EARLY_S if end else math.inf


def read_budget(submission: Path) -> Budget:
    return Budget(**read_submission(submission).requeue)


def main() -> int:
    """Closes the attempt of the job whose batch script calls; 0 if it is to be requeued."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("submission", type=Path)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--job-state", required=True)
    arguments = parser.parse_args()
    run = run_of_task(arguments.submission, os.environ)
    job_id = job_of_task(os.environ)
    log = (arguments.submission / "jobs" / f"{job_id}_0_log.out").read_text(
        encoding="utf-8", errors="replace"
    )
    state, _, why = arguments.job_state.partition(" ")
    code = arguments.exit_code
    lost = lost_node(log) if code else ""
    try:
        limit = limit_from(os.environ, read_submission(arguments.submission))
        ending = Ending(job_id, code, state, why == "TimeLimit", first_killed(log), lost, limit)
        with training_alone(run, job_id):
            again = finish_attempt(run, ending, read_budget(arguments.submission))
            last = read_attempts(run)[-1]
    except UserError as error:
        say(f"no verdict: {error}")
        return 1
    except OSError as error:
        say(f"no verdict: {unwritable(run, error)}")
        return 1
    say(f"attempt ended at step {last.last_step}: {last.cause}. {last.reason}")
    return 0 if again else 1


@contextmanager
def training_alone(run: Path, job_id: str) -> Iterator[None]:
    """Holds the run's lock; a rank of the job's own that is slow to die does not count.

    Raises:
        UserError: another process trains in the folder: its records are not touched.
    """
    from mtl_dist.run_folder import RunFolder  # NumPy, for which `mtl status` need not wait

    with ExitStack() as held:
        try:
            held.enter_context(RunFolder(run).locked())
        except UserError:
            attempts = read_attempts(run)
            if not attempts or attempts[-1].job_id != job_id:
                raise
        yield


if __name__ == "__main__":
    sys.exit(main())
