"""Whatever happens to a run on Slurm, it ends as if nothing had."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from mtl_dist.checkpoint import problems_of, steps_in
from mtl_dist.launch.attempts import read_attempts
from mtl_dist.launch.jobs import has_ended, view_runs
from mtl_dist.launch.script import Shape
from mtl_dist.launch.slurm import submit
from tests.slurm_cluster import (
    Cluster,
    has_closed,
    in_training,
    is_queued,
    local_run,
    mtl,
    ranks_of,
    step_rows,
    wait_for,
    weights_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1800)]

STEPS = 160


@dataclass
class Scene:
    """The run that suffers, its job, and what a later test wants to know of each disturbance."""

    slurm: Cluster
    run: Path
    job: str
    saved_before_cut: int = -1
    """The newest checkpoint when a save was cut off."""
    others_outlived_by: float = float("inf")
    """Seconds from the death of a rank to that of the last one."""


@dataclass(frozen=True)
class Disturbance:
    """Something that ends an attempt, and the cause under which it must be counted."""

    happen: Callable[[Scene], None]
    cause: str
    prepare: Callable[[Scene], None] = lambda scene: None
    """What is done while the job waits in the queue before."""


def send_signals(scene: Scene) -> None:
    """Again and again until the attempt is over: before, during and after its save."""
    is_over = has_closed(scene.run, len(read_attempts(scene.run)))
    while not is_over():
        for name in ("USR2", "TERM"):
            # Between its steps and the verdict the job has nobody to signal.
            subprocess.run(["scancel", "--quiet", f"--signal={name}", scene.job], check=False)


def requeue(scene: Scene) -> None:
    scene.slurm("scontrol", "requeue", scene.job)


def shorten(scene: Scene) -> None:
    scene.slurm("scontrol", "update", f"jobid={scene.job}", "TimeLimit=2")


def lengthen(scene: Scene) -> None:
    scene.slurm("scontrol", "update", f"jobid={scene.job}", "TimeLimit=30")


def sleep_to_the_end(scene: Scene) -> None:
    """Stops the ranks' clocks, but not the world's, until the deadline is near."""
    pids = ranks_of(scene.job).values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    environ = next(psutil.Process(pid).environ() for pid in pids)
    deadline = int(environ["MTL_END_TIME"]) - int(environ["MTL_SAVE_MARGIN"])
    time.sleep(max(0.0, deadline + 0.5 - time.time()))
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def evict(mode: str) -> Callable[[Scene], None]:
    def happen(scene: Scene) -> None:
        scene.slurm.devcluster("preemption", mode)
        sleep = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        scene.slurm("sbatch", *sleep)

    return happen


def lose_a_node(scene: Scene) -> None:
    """The second node hangs, so that nobody can save; Slurm gives it up; then it is gone."""
    lost = [pid for rank, pid in ranks_of(scene.job).items() if rank >= 2]
    for pid in lost:
        os.kill(pid, signal.SIGSTOP)
    scene.slurm("scontrol", "update", "nodename=mtl-node2", "state=down", "reason=test")
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    wait_for("the requeue", is_queued(scene.job))
    # It is alive and returns by itself as soon as it registers (ReturnToService).
    states = ("sinfo", "--noheader", "--nodes=mtl-node2", "--format=%T")
    wait_for("the node", lambda: "down" not in scene.slurm(*states))


def kill_a_rank(scene: Scene) -> None:
    os.kill(ranks_of(scene.job)[3], signal.SIGKILL)
    died = time.monotonic()
    wait_for("the death of the others", lambda: not ranks_of(scene.job))
    scene.others_outlived_by = time.monotonic() - died


def cut_off_a_save(scene: Scene) -> None:
    """The disk hangs in the middle of a save, and the rank that saves is killed there."""
    checkpoints, disk_hangs = scene.run / "checkpoints", Path("disk-hangs")
    disk_hangs.touch()
    wait_for("a save that hangs", lambda: bool(list(checkpoints.glob(".step_*.tmp"))))
    (torn,) = checkpoints.glob(".step_*.tmp")
    scene.saved_before_cut = steps_in(checkpoints)[-1]
    assert torn.name != f".step_{scene.saved_before_cut:08d}.tmp"
    main = psutil.Process(ranks_of(scene.job)[0])
    main.kill()
    wait_for("its death", lambda: not main.is_running() or main.status() == psutil.STATUS_ZOMBIE)
    disk_hangs.unlink()


DISTURBANCES = {
    "signals": Disturbance(send_signals, "preemption"),
    "requeue": Disturbance(requeue, "preemption"),
    "time limit": Disturbance(sleep_to_the_end, "time limit", prepare=shorten),
    "preemption by SIGTERM": Disturbance(evict("term"), "preemption", prepare=lengthen),
    "preemption by the user's signal": Disturbance(evict("signal"), "preemption"),
    "a lost node": Disturbance(lose_a_node, "node failure"),
    "a killed rank": Disturbance(kill_a_rank, "crash"),
    "a save cut off": Disturbance(cut_off_a_save, "crash"),
}


@pytest.fixture(scope="module")
def scene(cluster: Cluster, work: Path) -> Scene:
    """A run of two nodes with two ranks each that suffers every disturbance, one after the other."""
    run = work / "disturbed"
    (job,) = submit(Path("recipe.yaml"), Path("profile.yaml"), Shape(2, 2), run_dir=run).job_ids
    scene = Scene(cluster, run, job)
    for number, (name, disturbance) in enumerate(DISTURBANCES.items(), start=1):
        wait_for(f"steps before {name}", in_training(run))
        disturbance.happen(scene)
        wait_for(f"the end after {name}", has_closed(run, number))
        wait_for(f"the requeue after {name}", is_queued(job))
        for following in list(DISTURBANCES.values())[number : number + 1]:
            following.prepare(scene)
    wait_for("the end", lambda: has_ended(run))
    return scene


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    """The same run on four local ranks."""
    return local_run("undisturbed", 4)


def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(scene: Scene, undisturbed: Path) -> None:
    expected, found = weights_of(undisturbed, STEPS), weights_of(scene.run, STEPS)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_disturbed_run_consumes_every_sample_once_and_in_order(scene: Scene, undisturbed: Path) -> None:
    expected, found = step_rows(undisturbed), step_rows(scene.run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["step/loss"] for row in found] == [row["step/loss"] for row in expected]


@pytest.mark.parametrize("name", DISTURBANCES)
def test_an_attempt_is_counted_under_its_cause_and_the_next_goes_on(scene: Scene, name: str) -> None:
    number = list(DISTURBANCES).index(name)
    this, following = read_attempts(scene.run)[number : number + 2]
    assert this.cause == DISTURBANCES[name].cause
    assert this.last_step > this.first_step
    assert following.first_step == this.last_step


def test_a_killed_rank_ends_the_others_within_ten_seconds_and_is_named(scene: Scene) -> None:
    killed = read_attempts(scene.run)[list(DISTURBANCES).index("a killed rank")]
    assert killed.reason.startswith("rank 3 on mtl-node2: Killed")
    assert scene.others_outlived_by < 10


def test_a_run_whose_save_was_cut_off_goes_on_from_the_checkpoint_before(scene: Scene) -> None:
    cut_off = read_attempts(scene.run)[list(DISTURBANCES).index("a save cut off")]
    assert cut_off.reason.startswith("rank 0 on mtl-node1: Killed")
    resumed = [line for line in (scene.run / "log.txt").read_text().splitlines() if "resume " in line]
    assert f"from step {scene.saved_before_cut}," in resumed[-1]
    checkpoints = scene.run / "checkpoints"
    for step in steps_in(checkpoints):
        assert problems_of(checkpoints / f"step_{step:08d}") == []
    assert list(checkpoints.glob(".step_*")) == []


def test_the_status_of_a_disturbed_run_tells_its_story(scene: Scene) -> None:
    (view,) = view_runs([scene.run])
    assert (view.state, view.status.step if view.status else None) == ("done", STEPS)
    assert view.requeues == {"preemption": 4, "time limit": 1, "node failure": 1, "crash": 2}
    assert "requeued 8 times" in mtl("status", str(scene.run))
