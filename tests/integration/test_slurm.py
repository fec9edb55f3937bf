"""Runs on a real Slurm of two nodes: whatever happens to a run, it ends as if nothing had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mtl_dist.launch.attempts import Attempt, read_attempts
from mtl_dist.launch.jobs import cancel, has_ended, log_path, view_runs
from mtl_dist.launch.records import read_jobs
from mtl_dist.launch.script import Shape
from mtl_dist.launch.slurm import submit
from mtl_dist.launch.squeue import live_jobs
from mtl_dist.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DEVCLUSTER = ROOT / "slurm" / "devcluster"
STEPS = 160

RECIPE = """
name: slurm-test
tasks:
  digit: {kind: classification}
  thickness: {kind: regression, loss: {kind: smooth_l1}}
data: {train: [{path: data/digits}], image_size: 32, workers: 1}
model: {backbone: simple_cnn, norm: group, head: {dropout: 0.0}}
train: {max_steps: 160, global_batch: 16, log_every: 1, checkpoint_every: 10, evaluate_at_end: false}
"""

# With the time limit of two minutes that one disturbance sets, the ranks stop 35 s after their start; Slurm's
# own signal comes up to a minute early, so after them.
MARGIN_S = 85
PROFILE = f"""
partition: low
time_limit: 0:30:00
signal_lead_s: 1
save_margin_s: {MARGIN_S}
gpus_per_task: 0
cpus_per_task: 1
environment: {{OMP_NUM_THREADS: "1"}}
"""


# -- one cluster and one set of references for all --------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Callable[..., str]]:
    """A running cluster; the value runs a Slurm command on it and returns what it prints."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("Slurm is not installed: slurm/devcluster install")
    if os.geteuid() != 0:
        pytest.skip("the node names need a line in /etc/hosts: run as root")
    # A short path: munge's socket is in it.
    folder = Path(tempfile.mkdtemp(prefix="mtl-dc-"))
    command = [str(DEVCLUSTER), "--dir", str(folder)]
    subprocess.run([*command, "start"], check=True, capture_output=True, text=True)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def call(*arguments: str) -> str:
        program = [*command, *arguments[1:]] if arguments[0] == "devcluster" else list(arguments)
        return subprocess.run(program, check=True, capture_output=True, text=True).stdout.strip()

    try:
        yield call
    finally:
        subprocess.run([*command, "stop"], check=True)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with data, recipe and profile."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    mtl("prepare", "digits", "data/digits")
    Path("recipe.yaml").write_text(RECIPE)
    Path("profile.yaml").write_text(PROFILE)
    try:
        yield folder
    finally:
        os.chdir(before)


def mtl(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mtl_dist", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def local_run(work: Path, num_ranks: int, *overrides: str) -> Path:
    """The same recipe on this machine, undisturbed."""
    run = work / f"local-{num_ranks}-{len(overrides)}"
    mtl("launch", "recipe.yaml", "--nproc", str(num_ranks), "--run-dir", str(run), *overrides)
    return run


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    return local_run(work, 4)


# -- watching ---------------------------------------------------------------------------------------------


def wait_for(what: str, ready: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{what_slurm_does()}"
        time.sleep(0.1)


def what_slurm_does() -> str:
    """The queue and the controller's last words, for whoever reads of a failed test."""
    log = Path(os.environ["SLURM_CONF"]).with_name("slurmctld.log").read_text().splitlines()
    queue = subprocess.run(["squeue"], capture_output=True, text=True, check=False).stdout
    return "\n".join([queue, *log[-30:]])


def in_training(run: Path, first_step: int = 0) -> Callable[[], bool]:
    """Whether the current attempt has made at least two steps beyond `first_step`."""

    def ready() -> bool:
        assert not has_ended(run), log_path(run, None).read_text()
        status, attempts = read_status(run), read_attempts(run)
        if status is None or not attempts or attempts[-1].cause != "running":
            return False
        is_fresh = status.updated > attempts[-1].started and status.state == "running"
        return is_fresh and status.step >= max(first_step, attempts[-1].first_step) + 2

    return ready


def has_closed(run: Path, number: int) -> bool:
    return read_attempts(run)[number - 1].cause != "running"


def wait_for_requeue(job: str) -> None:
    wait_for("the requeue", lambda: live_jobs()[job].state == "PENDING")


def ranks_of(job: str) -> dict[int, int]:
    """The process ids of a job's ranks, by rank; data workers are younger and left out."""
    found: dict[int, list[int]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environ = process.environ()
            if environ.get("SLURM_JOB_ID") == job and "submitit.core._submit" in process.cmdline():
                found.setdefault(int(environ["SLURM_PROCID"]), []).append(process.pid)
    return {rank: min(pids) for rank, pids in found.items()}


def weights_of(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def step_rows(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


# -- everything that may happen to a run ------------------------------------------------------------------


@dataclass(frozen=True)
class Disturbance:
    """Something that ends an attempt, and the cause under which it must be counted."""

    happen: Callable[[Callable[..., str], str], None]
    cause: str
    prepare: Callable[[Callable[..., str], str], None] = lambda slurm, job: None
    """What is done while the job waits in the queue before."""


def send_signals(slurm: Callable[..., str], job: str) -> None:
    for name in ("USR2", "TERM", "USR2"):
        slurm("scancel", f"--signal={name}", job)


def requeue(slurm: Callable[..., str], job: str) -> None:
    slurm("scontrol", "requeue", job)


def shorten(slurm: Callable[..., str], job: str) -> None:
    slurm("scontrol", "update", f"jobid={job}", "TimeLimit=2")


def lengthen(slurm: Callable[..., str], job: str) -> None:
    slurm("scontrol", "update", f"jobid={job}", "TimeLimit=30")


def sleep_to_the_end(slurm: Callable[..., str], job: str) -> None:
    """Stops the ranks' clocks, but not the world's, until the deadline is near."""
    pids = ranks_of(job).values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    end = int(next(psutil.Process(pid).environ()["MTL_END_TIME"] for pid in pids))
    time.sleep(max(0.0, end - MARGIN_S + 0.5 - time.time()))
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def evict(mode: str) -> Callable[[Callable[..., str], str], None]:
    def happen(slurm: Callable[..., str], job: str) -> None:
        slurm("devcluster", "preemption", mode)
        sleep = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        slurm("sbatch", *sleep)

    return happen


def lose_a_node(slurm: Callable[..., str], job: str) -> None:
    """The second node hangs, so that nobody can save; Slurm gives it up; then it is gone."""
    lost = [pid for rank, pid in ranks_of(job).items() if rank >= 2]
    for pid in lost:
        os.kill(pid, signal.SIGSTOP)
    slurm("scontrol", "update", "nodename=mtl-node2", "state=down", "reason=test")
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    wait_for_requeue(job)
    # It is alive and returns by itself as soon as it registers (ReturnToService).
    wait_for(
        "the node", lambda: "down" not in slurm("sinfo", "--noheader", "--nodes=mtl-node2", "--format=%T")
    )


def kill_a_rank(slurm: Callable[..., str], job: str) -> None:
    os.kill(ranks_of(job)[3], signal.SIGKILL)


DISTURBANCES = {
    "signals": Disturbance(send_signals, "preemption"),
    "requeue": Disturbance(requeue, "preemption"),
    "time limit": Disturbance(sleep_to_the_end, "time limit", prepare=shorten),
    "preemption by SIGTERM": Disturbance(evict("term"), "preemption", prepare=lengthen),
    "preemption by the user's signal": Disturbance(evict("signal"), "preemption"),
    "a lost node": Disturbance(lose_a_node, "node failure"),
    "a killed rank": Disturbance(kill_a_rank, "crash"),
}


@pytest.fixture(scope="module")
def disturbed(cluster: Callable[..., str], work: Path) -> Path:
    """A run of two nodes with two ranks each that suffers every disturbance, one after the other."""
    run = work / "disturbed"
    (job,) = submit(Path("recipe.yaml"), Path("profile.yaml"), Shape(2, 2), run_dir=run).job_ids
    for name, disturbance in DISTURBANCES.items():
        wait_for(f"steps before {name}", in_training(run))
        number = len(read_attempts(run))
        disturbance.happen(cluster, job)
        wait_for(f"the end after {name}", partial(has_closed, run, number), 30.0)
        following = list(DISTURBANCES.values())[number:]
        wait_for_requeue(job)
        for later in following[:1]:
            later.prepare(cluster, job)
    wait_for("the end", lambda: has_ended(run))
    return run


def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(
    disturbed: Path, undisturbed: Path
) -> None:
    expected, found = weights_of(undisturbed), weights_of(disturbed)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_disturbed_run_consumes_every_sample_once_and_in_order(disturbed: Path, undisturbed: Path) -> None:
    expected, found = step_rows(undisturbed), step_rows(disturbed)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in found] == [row["train/loss"] for row in expected]


@pytest.mark.parametrize("name", DISTURBANCES)
def test_an_attempt_is_counted_under_its_cause_and_the_next_goes_on(disturbed: Path, name: str) -> None:
    number = list(DISTURBANCES).index(name)
    this, following = read_attempts(disturbed)[number : number + 2]
    assert this.cause == DISTURBANCES[name].cause
    assert this.last_step > this.first_step
    assert following.first_step == this.last_step


def test_a_killed_rank_ends_the_others_within_ten_seconds_and_is_named(disturbed: Path) -> None:
    killed = read_attempts(disturbed)[-2]
    assert killed.reason.startswith("rank 3 on mtl-node2: Killed")
    status_rows = [row for row in step_rows(disturbed) if row["step"] <= killed.last_step]
    assert killed.ended is not None
    assert killed.ended - status_rows[-1]["time"] < 10


def test_the_status_of_a_disturbed_run_tells_its_story(disturbed: Path) -> None:
    (view,) = view_runs([disturbed])
    assert (view.state, view.status.step if view.status else None) == ("done", STEPS)
    assert view.requeues == {"preemption": 4, "time limit": 1, "node failure": 1, "crash": 1}
    assert "requeued 7 times" in mtl("status", str(disturbed))


# -- the same on other numbers of ranks -------------------------------------------------------------------


# Without dropout, whose draws are a rank's own; with steps so small that a rounding error which turns a ReLU
# on or off does not grow. The losses of the batches differ by a tenth: another order would be seen at once.
SMOOTH = ("model.backbone=shufflenet_v2_x0_5", "optim.kind=sgd", "optim.lr=1e-4", "train.max_steps=30")


def test_a_requeued_run_may_have_another_number_of_ranks(cluster: Callable[..., str], work: Path) -> None:
    expected, run = local_run(work, 4, *SMOOTH), work / "elastic"
    submitted = submit(Path("recipe.yaml"), Path("profile.yaml"), Shape(2, 1), overrides=SMOOTH, run_dir=run)
    (job,) = submitted.job_ids
    wait_for("steps", in_training(run))
    cluster("scancel", "--signal=USR2", job)
    wait_for_requeue(job)
    cluster("scontrol", "update", f"jobid={job}", "NumNodes=1", "NumTasks=1")
    wait_for("the end", lambda: has_ended(run))
    assert [(attempt.nodes, attempt.ranks) for attempt in read_attempts(run)] == [(2, 2), (1, 1)]
    weights = weights_of(run, 30)
    for name, weight in weights_of(expected, 30).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    losses = [row["train/loss"] for row in step_rows(run)]
    assert losses == pytest.approx([row["train/loss"] for row in step_rows(expected)], rel=1e-5)


# -- sweeps, chains, cancelling ---------------------------------------------------------------------------


def test_a_sweep_is_one_array_of_runs_and_a_chained_job_follows_each(
    cluster: Callable[..., str], work: Path
) -> None:
    submitted = submit(
        Path("recipe.yaml"),
        Path("profile.yaml"),
        Shape(1, 1),
        overrides=["train.max_steps=40"],
        sweeps=["optim.lr=1e-3,1e-4", "train.seed=1,2"],
        parallel=2,
        then="evaluate",
        run_dir=work / "sweep",
    )
    assert len({job.split("_")[0] for job in submitted.job_ids}) == 1
    assert "%2" in submitted.script
    # The last task shares its number with the whole array: only it may be requeued.
    wait_for("steps of the last task", in_training(submitted.runs[3]))
    cluster("scancel", "--signal=USR2", submitted.job_ids[3])
    wait_for("the sweep", lambda: not live_jobs())
    causes = [[attempt.cause for attempt in read_attempts(run)] for run in submitted.runs]
    assert causes == [["done"], ["done"], ["done"], ["preemption", "done"]]
    for run in submitted.runs:
        assert view_runs([run])[0].state == "done"
        assert "test" in json.loads((run / "evaluation" / "metrics.json").read_text())
    names = [run.name for run in submitted.runs]
    assert names == ["0-lr=1e-3-seed=1", "1-lr=1e-3-seed=2", "2-lr=1e-4-seed=1", "3-lr=1e-4-seed=2"]
    first_losses = {step_rows(run)[-1]["train/loss"] for run in submitted.runs}
    assert len(first_losses) == 4


def test_a_cancelled_run_saves_stays_away_and_can_go_on(cluster: Callable[..., str], work: Path) -> None:
    run = work / "cancelled"
    submit(Path("recipe.yaml"), Path("profile.yaml"), Shape(1, 2), run_dir=run)
    wait_for("steps", in_training(run))
    (view,) = view_runs([run])
    assert view.state == "running"
    refused = subprocess.run(
        [sys.executable, "-m", "mtl_dist", "submit", str(run), "--cluster", "profile.yaml"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "is running" in refused.stderr
    assert "2 ranks" in mtl("logs", str(run))
    assert "submitit" in mtl("logs", str(run), "--rank", "1")
    cancel(run)
    wait_for("the end", lambda: has_ended(run), 60.0)
    assert view_runs([run])[0].state == "cancelled"
    (attempt,) = read_attempts(run)
    assert (run / "checkpoints" / f"step_{attempt.last_step:08d}" / "manifest.json").is_file()

    submit(run, Path("profile.yaml"), Shape(1, 1))
    wait_for("the end", lambda: has_ended(run))
    again: Attempt = read_attempts(run)[-1]
    assert (again.cause, again.first_step, again.ranks) == ("done", attempt.last_step, 1)
    assert len(read_jobs(run)) == 2


def test_a_mistake_in_the_run_is_not_tried_twice(cluster: Callable[..., str], work: Path) -> None:
    run = work / "mistaken"
    shutil.copytree("data/digits", "data/vanishing")
    overrides = ["data.train=[{path: data/vanishing}]"]
    submit(Path("recipe.yaml"), Path("profile.yaml"), Shape(1, 1), overrides=overrides, run_dir=run)
    shutil.rmtree("data/vanishing")
    wait_for("the end", lambda: has_ended(run), 60.0)
    (view,) = view_runs([run])
    assert view.state == "failed"
    assert "data/vanishing" in view.detail
    assert [attempt.cause for attempt in read_attempts(run)] == ["mistake"]


def test_the_doctor_looks_at_a_cluster(cluster: Callable[..., str], work: Path) -> None:
    printed = mtl("doctor", "--cluster", "profile.yaml")
    assert "between 2" in printed
    assert "mtl-node2" in printed
