"""Submitting, with a pretended sbatch: what is written, what is refused, what the ranks get."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtl_dist.errors import UserError
from mtl_dist.launch.attempts import read_budget, run_of_task
from mtl_dist.launch.rank import EvaluationJob, TrainingJob, become_rank, failures_recorded, stop_signal
from mtl_dist.launch.records import read_jobs
from mtl_dist.launch.script import Shape
from mtl_dist.launch.slurm import Submitted, submit
from mtl_dist.status import read_status

RECIPE = """
name: tiny
tasks: {digit: {kind: classification}}
data: {train: [{path: data/digits}], image_size: 32}
train: {global_batch: 12}
"""

ACCEPT = 'echo "Submitted batch job 12"'


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and a profile, on a machine with a Slurm that accepts everything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "profile.yaml").write_text("gpus_per_task: 0\ncpus_per_task: 2\nrequeue: {crashes: 7}\n")
    (tmp_path / "bin").mkdir()
    for name, body in {"sbatch": ACCEPT, "srun": "", "squeue": ""}.items():
        pretend(tmp_path, name, body)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def pretend(work: Path, name: str, body: str) -> None:
    path = work / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def submit_tiny(*, shape: Shape = Shape(2, 2), **options: object) -> Submitted:  # noqa: B008  (frozen)
    return submit(Path("tiny.yaml"), Path("profile.yaml"), shape, **options)  # type: ignore[arg-type]


def test_a_run_folder_holds_all_that_the_job_needs(work: Path) -> None:
    submitted = submit_tiny(overrides=["train.epochs=3"])
    (run,), (job,) = submitted.runs, submitted.job_ids
    assert job == "12"
    assert run.parent == work / "runs" / "tiny"
    assert [(record.id, record.kind) for record in read_jobs(run)] == [("12", "train")]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["train"]["epochs"] == 3
    assert recipe["data"]["train"][0]["path"] == str(work / "data" / "digits")
    folder = run / "submissions" / "001"
    assert (folder / "code" / "mtl_dist" / "cli.py").is_file()
    assert run_of_task(folder, {}).resolve() == run
    assert read_budget(folder).crashes == 7
    assert submitted.script == (folder / "jobs" / "12_submission.sh").read_text()


def test_later_edits_of_the_recipe_do_not_change_a_queued_job(work: Path) -> None:
    (run,) = submit_tiny().runs
    (work / "tiny.yaml").write_text(RECIPE.replace("12", "24"))
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["global_batch"] == 12


def test_what_is_pickled_holds_paths_only(work: Path) -> None:
    (run,) = submit_tiny().runs
    with (run / "submissions" / "001" / "jobs" / "12_submitted.pkl").open("rb") as file:
        call = pickle.load(file).function
    assert call == TrainingJob(run, run / "submissions" / "001")
    assert vars(EvaluationJob(run)) == {"run": run}


def test_a_dry_run_prints_the_script_and_writes_nothing(work: Path) -> None:
    before = sorted(work.rglob("*"))
    (work / "bin" / "sbatch").unlink()
    submitted = submit_tiny(sweeps=["optim.lr=1e-3,1e-4"], parallel=1, dry_run=True)
    assert "#SBATCH --array=0-1%1" in submitted.script
    assert submitted.job_ids == []
    assert [path for path in sorted(work.rglob("*")) if path.name != "sbatch"] == [
        path for path in before if path.name != "sbatch"
    ]


def test_a_sweep_is_one_array_with_a_run_and_a_recipe_per_point(work: Path) -> None:
    submitted = submit_tiny(sweeps=["optim.lr=1e-3,1e-4", "train.seed=1,2"], run_dir=Path("sweep"))
    assert submitted.job_ids == ["12_0", "12_1", "12_2", "12_3"]
    for index, run in enumerate(submitted.runs):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        assert (recipe["optim"]["lr"], recipe["train"]["seed"]) == (
            (1e-3, 1e-4)[index // 2],
            (1, 2)[index % 2],
        )
        folder = run / read_jobs(run)[0].submission
        assert run_of_task(folder, {"SLURM_ARRAY_TASK_ID": str(index)}).resolve() == run


def test_a_chained_job_waits_for_its_own_run_and_never_for_a_failed_one(work: Path) -> None:
    submitted = submit_tiny(sweeps=["train.seed=1,2"], then="evaluate", run_dir=Path("sweep"))
    assert [record.kind for record in read_jobs(submitted.runs[0])] == ["train", "evaluate"]
    script = (work / "sweep" / "submissions" / "001" / "jobs" / "12_submission.sh").read_text()
    assert "#SBATCH --dependency=aftercorr:12" in script
    assert "#SBATCH --kill-on-invalid-dep=yes" in script
    assert "scontrol requeue" not in script


def test_a_run_that_gave_up_is_submitted_again_by_its_folder(work: Path) -> None:
    (run,) = submit_tiny().runs
    pretend(work, "sbatch", 'echo "Submitted batch job 13"')
    again = submit(run, Path("profile.yaml"), Shape(1, 3))
    assert (again.runs, again.job_ids) == ([run], ["13"])
    assert [record.submission for record in read_jobs(run)] == ["submissions/001", "submissions/002"]


def test_a_run_whose_job_still_runs_is_not_submitted_twice(work: Path) -> None:
    (run,) = submit_tiny().runs
    pretend(work, "squeue", "echo '12|RUNNING|None|now|n1'")
    with pytest.raises(UserError, match="job 12 of this run is running"):
        submit(run, Path("profile.yaml"), Shape(1, 1))


def test_a_folder_that_holds_another_run_is_refused_and_kept(work: Path) -> None:
    (run,) = submit_tiny().runs
    before = (run / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"train\.global_batch: expected 12 .* found 24"):
        submit_tiny(run_dir=run, overrides=["train.global_batch=24"])
    assert (run / "recipe.yaml").read_text() == before
    assert len(read_jobs(run)) == 1


def test_a_mistake_in_the_profile_names_the_file(work: Path) -> None:
    (work / "profile.yaml").write_text("partitoin: gpu\ntime_limit: soon\n")
    with pytest.raises(UserError) as error:
        submit_tiny()
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("profile.yaml: ") for line in lines)


def test_what_sbatch_refuses_is_said_once_and_leaves_no_folder(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend(work, "sbatch", 'echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    with pytest.raises(UserError, match="invalid partition specified: gpu"):
        submit_tiny()
    assert capfd.readouterr().err == ""
    assert not list((work / "runs" / "tiny").iterdir())


def test_ranks_that_do_not_divide_the_batch_are_refused_before_the_queue(work: Path) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch"):
        submit_tiny(shape=Shape(5, 1))
    assert not (work / "runs").exists()


def test_without_slurm_it_says_where_to_go(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="slurm/devcluster"):
        submit_tiny()


# -- in the job -------------------------------------------------------------------------------------------


def test_a_slurm_task_becomes_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"PROCID": "5", "LOCALID": "1", "NTASKS": "8", "JOB_NUM_NODES": "2", "JOB_ID": "12"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    environ: dict[str, str] = {}
    assert become_rank(environ) == 5
    assert environ == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_the_ranks_know_the_end_of_the_job() -> None:
    stop = stop_signal({"MTL_END_TIME": "1000", "MTL_SAVE_MARGIN": "90"})
    assert (stop.deadline, stop.margin_s) == (1000.0, 90.0)
    assert stop_signal({"MTL_END_TIME": "", "MTL_SAVE_MARGIN": "90"}).deadline is None


@pytest.mark.parametrize("error", [RuntimeError("boom"), UserError("fix this"), KeyboardInterrupt("ctrl-c")])
def test_why_a_rank_failed_is_left_behind(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), failures_recorded(tmp_path, rank=0):
        raise error
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert str(error) in failure["reason"]
    assert failure["mistake"] is isinstance(error, UserError)
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.reason) == ("failed", str(error))


@pytest.mark.parametrize(
    "module", ["mtl_dist.launch.rank", "mtl_dist.launch.attempts", "mtl_dist.launch.jobs"]
)
def test_what_must_answer_at_once_does_not_wait_for_torch(module: str) -> None:
    """A rank that imports torch for seconds before it handles signals would die of an early one."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
