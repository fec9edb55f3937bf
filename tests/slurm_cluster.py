"""A real Slurm of two nodes for the tests, and how to wait for what happens on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from mtl_dist.errors import UserError
from mtl_dist.launch.attempts import read_attempts
from mtl_dist.launch.jobs import has_ended, log_path
from mtl_dist.launch.squeue import live_jobs
from mtl_dist.status import read_status

ROOT = Path(__file__).parents[1]
DEVCLUSTER = ROOT / "slurm" / "devcluster"


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs; this process's Slurm commands go to it."""

    folder: Path

    def __call__(self, *command: str) -> str:
        """What a Slurm command prints."""
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def devcluster(self, *arguments: str) -> None:
        command = [str(DEVCLUSTER), "--dir", str(self.folder), *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def running_cluster(*options: str) -> Iterator[Cluster]:
    """Starts a cluster and ends it; skips the test where there can be none."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("Slurm is not installed: slurm/devcluster install")
    if os.geteuid() != 0:
        pytest.skip("the node names need a line in /etc/hosts: run as root")
    # A short path: munge's socket is in it.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="mtl-dc-")))
    before = os.environ.get("SLURM_CONF")
    try:
        cluster.devcluster("start", *options)
        os.environ["SLURM_CONF"] = str(cluster.folder / "slurm.conf")
        yield cluster
    finally:
        cluster.devcluster("stop")
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


# -- our own commands -------------------------------------------------------------------------------------


def run_mtl(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A wide terminal: no word of a table is broken.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    command = [sys.executable, "-m", "mtl_dist", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def mtl(*arguments: str) -> str:
    """What a command prints, which must succeed."""
    result = run_mtl(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def mistake(*arguments: str) -> str:
    """What a command says that must end as a user's mistake: one line, exit code 2."""
    result = run_mtl(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    return line


def local_run(name: str, num_ranks: int, *overrides: str, recipe: str = "recipe.yaml") -> Path:
    """The same recipe on this machine, undisturbed."""
    run = Path(name).absolute()
    mtl("launch", recipe, "--nproc", str(num_ranks), "--run-dir", str(run), *overrides)
    return run


# -- watching ---------------------------------------------------------------------------------------------


def wait_for(what: str, ready: Callable[[], bool], seconds: float = 600.0) -> None:
    """Waits for a state; the time is only there to end a test that went wrong."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{what_slurm_does()}"
        time.sleep(0.2)


def what_slurm_does() -> str:
    """The queue and the controller's last words, for whoever reads of a failed test."""
    log = Path(os.environ["SLURM_CONF"]).with_name("slurmctld.log").read_text().splitlines()
    queue = subprocess.run(["squeue"], capture_output=True, text=True, check=False).stdout
    return "\n".join([queue, *log[-30:]])


def in_training(run: Path) -> Callable[[], bool]:
    """Whether the current attempt has made at least two steps."""

    def ready() -> bool:
        status, attempts = read_status(run), read_attempts(run)
        if status is not None and attempts and attempts[-1].cause == "running":
            is_fresh = status.updated > attempts[-1].started and status.state == "running"
            if is_fresh and status.step >= attempts[-1].first_step + 2:
                return True
        assert not has_ended(run), f"{read_attempts(run)}\n{log_path(run, None).read_text()}"
        return False

    return ready


def has_closed(run: Path, number: int) -> Callable[[], bool]:
    """Whether the run's attempt of that number, from 1, has ended."""
    return lambda: len(found := read_attempts(run)) >= number and found[number - 1].cause != "running"


def is_queued(job: str) -> Callable[[], bool]:
    """Whether the job waits in the queue; not as long as a busy controller does not answer."""

    def ready() -> bool:
        with suppress(UserError):
            return job in (live := live_jobs()) and live[job].state == "PENDING"
        return False

    return ready


def ranks_of(job: str) -> dict[int, int]:
    """The process ids of a job's ranks, by rank; data workers are younger and left out, and so is srun."""
    found: dict[int, list[tuple[float, int]]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environ = process.environ()
            is_ours = environ.get("SLURM_JOB_ID") == job and "submitit.core._submit" in process.cmdline()
            if is_ours and process.name() != "srun":
                # Numbers of processes begin again at 1: a younger one may have a smaller number.
                born = (process.create_time(), process.pid)
                found.setdefault(int(environ["SLURM_PROCID"]), []).append(born)
    return {rank: min(processes)[1] for rank, processes in found.items()}


# -- what a run has left ----------------------------------------------------------------------------------


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def step_rows(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]
