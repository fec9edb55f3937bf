"""Jobs on Slurm from their submission to their end: other numbers of ranks, sweeps, mistakes, cancelling."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mtl_dist.launch.attempts import read_attempts
from mtl_dist.launch.jobs import has_ended, view_runs
from mtl_dist.launch.profile import ClusterProfile
from mtl_dist.launch.records import read_jobs
from mtl_dist.launch.script import Shape, build_executor, script_text
from mtl_dist.launch.slurm import submit
from mtl_dist.launch.squeue import live_jobs
from tests.slurm_cluster import (
    ROOT,
    Cluster,
    in_training,
    is_queued,
    local_run,
    mistake,
    mtl,
    running_cluster,
    step_rows,
    wait_for,
    weights_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]

RECIPE, PROFILE = Path("recipe.yaml"), Path("profile.yaml")

LONG = ("train.max_steps=100000",)
"""Such a run does not end by itself while a test asks about it."""

# Without dropout, whose draws are a rank's own; without ReLU and maximum, where a rounding error decides the
# way of a gradient: with them (shufflenet, lr 1e-4) even one process on AVX2 kernels parts from itself on
# AVX-512 kernels after 14 steps, by 4e-5 of the loss after 30. Here 2e-7 is left of rounding errors, on SSE,
# AVX2 and AVX-512 alike. The losses of the batches differ by a tenth: another order would be seen at once.
SMOOTH = ("model.backbone=own_parts.Smooth", "optim.kind=sgd", "optim.lr=1e-3", "train.max_steps=30")

# A network of ReLUs: the steps are so small that rounding errors do not grow.
DIGITS = ("model.backbone=shufflenet_v2_x0_5", "model.norm=group", "train.global_batch=16")
DIGITS += ("optim.kind=sgd", "optim.lr=1e-5", "optim.momentum=0", "train.max_steps=12", "train.log_every=1")
DIGITS += ("train.evaluate_at_end=false",)


# Called as Python in a job: its second rank dies at once, and the first is deaf to all but SIGKILL. The
# attempt after that listens for 45 s.
PRETENDED_PYTHON = """#!/bin/bash
restarts=${SLURM_RESTART_COUNT:-0}
[[ "$*" == *launch.attempts* ]] && exit $(( restarts > 0 ))
echo "attempt $restarts is step $SLURM_STEP_ID" >> heard
trap 'echo "attempt $restarts hears SIGTERM" >> heard' TERM
(( restarts + SLURM_PROCID == 1 )) && (( restarts == 0 )) && exit 1
while (( SECONDS < 45 )); do sleep 0.2; done
echo "attempt $restarts ends" >> heard
"""


@pytest.fixture(scope="module", autouse=True)
def crashed(cluster: Cluster, work: Path) -> Path:
    """What is heard by a job that crashes; it runs beside the tests, because Slurm takes its time."""
    folder = work / "crashed"
    (folder / "jobs").mkdir(parents=True)
    (folder / "heard").touch()
    python = folder / "python"
    python.write_text(PRETENDED_PYTHON)
    python.chmod(0o755)
    profile = ClusterProfile(python=str(python), partition="low", gpus_per_task=0, cpus_per_task=1)
    script = script_text(build_executor(folder, "crashed", profile, Shape(1, 2), dry_run=True))
    subprocess.run(["sbatch", f"--chdir={folder}"], input=script, check=True, capture_output=True, text=True)
    return folder / "heard"


def test_two_nodes_end_with_the_weights_of_two_and_of_four_local_ranks(cluster: Cluster, work: Path) -> None:
    recipe, run = ROOT / "configs" / "digits.yaml", work / "digits"
    submit(recipe, PROFILE, Shape(2, 2), overrides=DIGITS, run_dir=run)
    wait_for("the end", lambda: has_ended(run))
    weights, losses = weights_of(run, 12), [row["step/loss"] for row in step_rows(run)]
    assert len(losses) == 12
    four, two = (local_run(f"digits-{n}", n, *DIGITS, recipe=str(recipe)) for n in (4, 2))
    for name, weight in weights_of(four, 12).items():
        assert torch.equal(weights[name], weight), name
    for name, weight in weights_of(two, 12).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert losses == [row["step/loss"] for row in step_rows(four)]
    assert losses == pytest.approx([row["step/loss"] for row in step_rows(two)], rel=1e-5)


def test_a_requeued_run_in_a_container_may_have_another_number_of_ranks(cluster: Cluster, work: Path) -> None:
    expected, run = local_run("smooth", 4, *SMOOTH), work / "elastic"
    (job,) = submit(RECIPE, Path("contained.yaml"), Shape(2, 1), overrides=SMOOTH, run_dir=run).job_ids
    wait_for("steps", in_training(run))
    cluster("scancel", "--signal=USR2", job)
    wait_for("the requeue", is_queued(job))
    cluster("scontrol", "update", f"jobid={job}", "NumNodes=1", "NumTasks=1")
    wait_for("the end", lambda: has_ended(run))
    assert [(attempt.nodes, attempt.ranks) for attempt in read_attempts(run)] == [(2, 2), (1, 1)]
    weights = weights_of(run, 30)
    for name, weight in weights_of(expected, 30).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    losses = [row["step/loss"] for row in step_rows(run)]
    assert losses == pytest.approx([row["step/loss"] for row in step_rows(expected)], rel=1e-5)
    commands = (work / "container.log").read_text().splitlines()
    assert [sum(module in command for command in commands) for module in ("submitit", "attempts")] == [3, 2]


def test_a_sweep_is_one_array_of_runs_and_a_chained_job_follows_each(cluster: Cluster, work: Path) -> None:
    submitted = submit(
        RECIPE,
        PROFILE,
        Shape(1, 1),
        overrides=["train.max_steps=100"],
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
    assert names == ["lr=1e-3-seed=1", "lr=1e-3-seed=2", "lr=1e-4-seed=1", "lr=1e-4-seed=2"]
    assert len({step_rows(run)[-1]["step/loss"] for run in submitted.runs}) == 4


SMALLER = {"--tasks-per-node 4": "", "--tasks-per-node 8": "--tasks-per-node 2", "--rank 5": "--rank 1"}
"""What of the docs' walk is too large for a cluster without GPUs."""


def test_the_walk_of_the_docs_runs_as_written(
    cluster: Cluster, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "slurm.md").read_text()
    walk = text[text.index("## Ten minutes") : text.index("## What happens when")].replace("\\\n", " ")
    for written, here in SMALLER.items():
        walk = walk.replace(written, here)
    place = work / "walk"
    (place / "slurm").mkdir(parents=True)
    (place / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(place)
    profile = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", walk, re.DOTALL)[0])
    here = {"partition": "low", "account": None, "gpus_per_task": 0, "cpus_per_task": 1}
    here["network_interface"] = None
    Path("slurm/mine.yaml").write_text(yaml.safe_dump(profile | here | {"time_limit": "0:30:00"}))
    lines = [line.split() for line in re.findall(r"^\$ mtl (.*)", walk, re.MULTILINE)]
    names = ["prepare", "doctor", "submit", "submit", "status", "logs", "logs", "cancel", "submit", "submit"]
    assert [line[0] for line in lines] == names

    def of(number: int, run: Path | None = None) -> list[str]:
        return [str(run) if word.startswith("runs/digits/") else word for word in lines[number]]

    mtl(*of(0))
    found = mtl(*of(1))
    assert "between 2 ranks" in found and "2 ranks differ from one process" in found and "mtl-node2" in found
    tested = subprocess.run(
        ["sbatch", "--test-only"], input=mtl(*of(2)), capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0 and "on nodes mtl-node[1-2]" in tested.stderr, tested.stderr
    assert not Path("runs/digits").exists()
    run = place / mtl(*of(3)).split()[2]
    wait_for("steps", in_training(run))
    assert "running" in mtl(*of(4))
    assert "is running" in mistake("submit", str(run), "--cluster", "slurm/mine.yaml")
    follower = subprocess.Popen([sys.executable, "-m", "mtl_dist", *of(5, run)], stdout=subprocess.PIPE)
    assert "submitit" in mtl(*of(6, run))
    assert "expected 0 to 1, found 2" in mistake("logs", str(run), "--rank", "2")
    assert "cancelled job" in mtl(*of(7, run))
    wait_for("the end", lambda: has_ended(run))
    assert b"2 ranks" in follower.communicate(timeout=60)[0]
    assert view_runs([run])[0].state == "cancelled"
    assert "expected a run that waits or runs" in mistake("cancel", str(run))
    (attempt,) = read_attempts(run)
    assert (run / "checkpoints" / f"step_{attempt.last_step:08d}" / "manifest.json").is_file()

    mtl(*of(8, run))
    wait_for("steps", in_training(run))
    again = read_attempts(run)[-1]
    assert (again.first_step, again.nodes, again.ranks) == (attempt.last_step, 1, 2)
    mtl("cancel", str(run))
    assert "--array=0-3%2" in mtl(*of(9), "--dry-run")
    wait_for("the end", lambda: has_ended(run))


def test_a_run_that_waits_says_so_and_can_be_cancelled(cluster: Cluster, work: Path) -> None:
    run = work / "waiting"
    printed = mtl("submit", "recipe.yaml", "--cluster", "held.yaml", "--nodes", "2", "--run-dir", str(run))
    assert printed.startswith(f"job {read_jobs(run)[0].id}  {run}")
    assert "queued" in (status := mtl("status", str(run))) and "JobHeldUser" in status
    assert "nothing has been printed yet; it is queued (JobHeldUser)" in mistake("logs", str(run))
    mtl("cancel", str(run))
    wait_for("the end", lambda: has_ended(run))
    assert "cancelled" in mtl("status", str(run))


def test_a_mistake_is_not_tried_twice_and_a_crash_that_repeats_not_a_third_time(
    cluster: Cluster, work: Path
) -> None:
    mistaken, crashing = work / "mistaken", work / "crashing"
    shutil.copytree("data/digits", "data/vanishing")
    overrides = ["data.train=[{path: data/vanishing}]"]
    submit(RECIPE, PROFILE, Shape(1, 1), overrides=overrides, run_dir=mistaken)
    shutil.rmtree("data/vanishing")
    # The first save fails; that is heard of at the second one.
    saves = ["train.checkpoint_every=3"]
    submit(RECIPE, Path("broken-disk.yaml"), Shape(1, 1), overrides=saves, run_dir=crashing)
    wait_for("the end", lambda: has_ended(mistaken) and has_ended(crashing))

    (view,) = view_runs([mistaken])
    assert view.state == "failed"
    assert "data/vanishing" in view.detail
    assert [attempt.cause for attempt in read_attempts(mistaken)] == ["mistake"]

    attempts = read_attempts(crashing)
    assert [(attempt.cause, attempt.last_step) for attempt in attempts] == [("crash", 6), ("crash", 6)]
    status = mtl("status", str(crashing))
    assert "failed" in status and "rank 0: RuntimeError: the disk failed" in status
    status_file = json.loads((crashing / "status.json").read_text())
    assert "It failed twice in the same way at step 6: not started again." in status_file["reason"]


def test_a_kill_that_slurm_repeats_a_minute_later_does_not_meet_the_next_attempt(crashed: Path) -> None:
    wait_for("the end of the second attempt", lambda: crashed.read_text().count("attempt 1 ends") == 2)
    heard = set(crashed.read_text().splitlines())
    first = {"attempt 0 is step 0", "attempt 0 hears SIGTERM"}
    assert heard == first | {"attempt 1 is step 1", "attempt 1 ends"}


def test_a_cluster_without_accounting_does_as_well(work: Path) -> None:
    run = work / "without-accounting"
    with running_cluster("--no-accounting") as cluster:
        accounting = subprocess.run(["sacct"], capture_output=True, text=True, check=False)
        assert accounting.returncode != 0
        (job,) = submit(RECIPE, PROFILE, Shape(2, 1), overrides=LONG, run_dir=run).job_ids
        wait_for("steps", in_training(run))
        cluster("scancel", "--signal=USR2", job)
        wait_for("the requeue", is_queued(job))
        assert "queued" in (status := mtl("status", str(run))) and "1 x preemption" in status
        wait_for("steps", in_training(run))
        assert "running" in mtl("status", str(run))
        assert "2 ranks" in mtl("logs", str(run))
        cluster("scancel", job)
        wait_for("the end", lambda: has_ended(run))
        # Nobody but the controller knows that it was cancelled, and not that it stopped by itself.
        assert view_runs([run])[0].state == "cancelled"
        (_, attempt) = read_attempts(run)
        assert (run / "checkpoints" / f"step_{attempt.last_step:08d}" / "manifest.json").is_file()
