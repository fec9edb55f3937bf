"""What runs in every task of a Slurm job: become a rank, train or evaluate, write down why it failed.

The callables are what submitit pickles at submission and unpickles at every start, also after a requeue: they
hold paths only, so that it does not matter which of its copies survives.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from submitit import JobEnvironment

from mtl_dist.config.trust import VARIABLE
from mtl_dist.errors import UserError
from mtl_dist.launch.attempts import Attempt, begin_attempt, read_budget, record_failure
from mtl_dist.launch.records import read_submission
from mtl_dist.launch.snapshot import differences
from mtl_dist.printable import say
from mtl_dist.run_folder import RunFolder, writing_to
from mtl_dist.status import Status, read_status, write_last_status
from mtl_dist.stopping import StopSignal


@dataclass(frozen=True)
class TrainingJob:
    """Trains the run in `run`, from its newest good checkpoint."""

    run: Path
    submission: Path

    def __call__(self) -> None:
        # Whoever submitted the run has trusted it; their home, with their mark's key, may not be here.
        os.environ[VARIABLE] = "1"
        # First of all, and after submitit has installed its own handlers: importing torch takes seconds.
        stop = stop_signal(os.environ)
        stop.install()
        stop.ignore_afterwards()
        rank = become_rank(os.environ)
        with ExitStack() as held:
            if rank == 0:
                # First of all: whoever trains here already keeps its records as they are.
                held.enter_context(RunFolder(self.run).locked())
            with failures_recorded(self.run, rank):
                self._train(rank, stop)

    def _train(self, rank: int, stop: StopSignal) -> None:
        submission = read_submission(self.submission)
        if rank == 0:
            with writing_to(self.run):
                begin_attempt(self.run, this_attempt(self.run), read_budget(self.submission))
        from mtl_dist.recipe import load_recipe
        from mtl_dist.runs.train import train

        recipe = load_recipe(self.run / "recipe.yaml")
        if rank == 0:
            for line in differences(self.submission / "code", submission.modules):
                say(f"warning: {line}", sys.stderr)
        train(recipe, self.run, stop, data_moved=submission.data_moved)


@dataclass(frozen=True)
class EvaluationJob:
    """Evaluates the best weights of the run in `run` on its test split, or on val where there is none."""

    run: Path

    def __call__(self) -> None:
        os.environ[VARIABLE] = "1"
        become_rank(os.environ)
        from mtl_dist.runs.evaluation import evaluate_run

        evaluate_run(self.run)


def stop_signal(environ: MutableMapping[str, str]) -> StopSignal:
    """A stop signal that knows the job's end from the batch script (a job without a time limit has none)."""
    end = environ.get("MTL_END_TIME")
    margin = float(environ.get("MTL_SAVE_MARGIN", "60"))
    return StopSignal(deadline=float(end) if end else None, margin_s=margin)


def become_rank(environ: MutableMapping[str, str]) -> int:
    """Tells torch.distributed, by the environment, which rank this Slurm task is; returns the rank.

    The address and the port of the rendezvous were exported by the batch script.
    """
    task = JobEnvironment()
    environ["RANK"] = str(task.global_rank)
    environ["LOCAL_RANK"] = str(task.local_rank)
    environ["WORLD_SIZE"] = str(task.num_tasks)
    environ["LOCAL_WORLD_SIZE"] = str(task.num_tasks // task.num_nodes)
    return task.global_rank


def this_attempt(run: Path) -> Attempt:
    task = JobEnvironment()
    status = read_status(run)
    return Attempt(
        job_id=task.job_id,
        nodes=task.num_nodes,
        ranks=task.num_tasks,
        started=time.time(),
        first_step=status.step if status is not None else 0,
    )


@contextmanager
def failures_recorded(run: Path, rank: int) -> Iterator[None]:
    """Leaves behind why the body failed, for the batch script's verdict and for `mtl status`.

    Where the disk is full, or the folder gone, the job's own log has to do.

    A status that the body has left itself stays: it names the first cause, which may be another rank's.
    """
    began = time.time()
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            record_failure(run, rank, error)
        status = read_status(run) or Status("running")
        if rank == 0 and (status.state != "failed" or status.updated < began):
            failed = replace(status, state="failed", reason=str(error), updated=time.time())
            with suppress(OSError):
                write_last_status(run, replace(failed, retry=not isinstance(error, UserError)))
        raise
