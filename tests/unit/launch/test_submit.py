"""Submitting, with a pretended sbatch: what is written, what is refused, what the ranks get."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtl_dist.data.manifest import LabelCounts, Manifest, ShardInfo, SplitInfo, write_manifest
from mtl_dist.durable import locked
from mtl_dist.errors import UserError
from mtl_dist.launch import attempts
from mtl_dist.launch.attempts import Attempt, Budget, begin_attempt, read_budget, run_of_task
from mtl_dist.launch.jobs import cancel, view_runs
from mtl_dist.launch.rank import EvaluationJob, TrainingJob, become_rank, failures_recorded, stop_signal
from mtl_dist.launch.records import read_jobs, read_submission
from mtl_dist.launch.script import Shape
from mtl_dist.launch.slurm import Submitted, submit
from mtl_dist.specs import TaskInfo
from mtl_dist.status import Status, read_status, write_status

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
    split = SplitInfo(0, (), {"digit": LabelCounts(0, 0)})
    (tmp_path / "data" / "digits").mkdir(parents=True)
    manifest = Manifest(1, "uint8", {"digit": TaskInfo("classification", ("0", "1"))}, {"train": split})
    write_manifest(tmp_path / "data" / "digits", manifest)
    (tmp_path / "profile.yaml").write_text("gpus_per_task: 0\ncpus_per_task: 2\nrequeue: {crashes: 7}\n")
    (tmp_path / "bin").mkdir()
    for name, body in {"sbatch": ACCEPT, "srun": "", "squeue": "", "scontrol": ""}.items():
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


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.train=[{path: data/gone}]"],
            "data/gone: expected a prepared dataset, found no such dir",
        ),
        (["data.val=[{path: data/digits, split: val}]"], "expected a split 'val', found none"),
        (["data.train=[{path: data/x*.tar, fields: {digit: {kind: classification, from: cls}}}]"], "no|none"),
        (["tasks.thickness={kind: regression}"], r"tasks\.thickness: expected"),
    ],
)
def test_data_that_is_missing_is_found_at_submission(work: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        submit_tiny(overrides=overrides)
    assert "check_data: false" in str(error.value)
    assert not (work / "runs").exists()
    with (work / "profile.yaml").open("a") as profile:
        profile.write("check_data: false\n")
    assert submit_tiny(overrides=overrides).job_ids == ["12"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("resnet19", "Did you mean resnet18"), ("timm/test_vitt", "Did you mean timm/test_vit")],
)
def test_a_backbone_that_is_none_is_found_at_submission(work: Path, name: str, said: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=said):
        submit_tiny(overrides=[f"model.backbone={name}"])
    assert not (work / "runs").exists()


def test_a_missing_shard_is_found_at_submission(work: Path) -> None:
    shard = ShardInfo("train-000000.tar", 3, 10, "0" * 64)
    split = SplitInfo(3, (shard,), {"digit": LabelCounts(3, 0)})
    manifest = Manifest(1, "uint8", {"digit": TaskInfo("classification", ("0", "1"))}, {"train": split})
    write_manifest(work / "data" / "digits", manifest)
    with pytest.raises(UserError, match=r"train-000000.tar: expected a shard, found none"):
        submit_tiny()


def test_a_job_that_is_submitted_from_a_job_is_one_of_its_own(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(work, "sbatch", f"env | grep -E '^(SLURM|SBATCH)_' > {work}/seen; {ACCEPT}")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_NTASKS_PER_NODE", "SBATCH_ARRAY_INX"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert submit_tiny().job_ids == ["12"]
    assert (work / "seen").read_text().split() == ["SLURM_CONF=/etc/slurm.conf"]
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "5"


def test_a_new_run_begins_with_another_ones_weights_and_data_may_have_moved(work: Path) -> None:
    (first,) = submit_tiny().runs
    (second,) = submit_tiny(start_from=first).runs
    assert yaml.safe_load((second / "recipe.yaml").read_text())["start_from"] == str(first)
    with pytest.raises(UserError, match=r"nowhere: expected a run folder"):
        submit_tiny(start_from=Path("nowhere"))
    shutil.move(work / "data" / "digits", work / "elsewhere")
    moved = ["data.train=[{path: elsewhere}]"]
    with pytest.raises(UserError, match="--data-moved"):
        submit(first, Path("profile.yaml"), Shape(1, 1), overrides=moved)
    submit(first, Path("profile.yaml"), Shape(1, 1), overrides=moved, data_moved=True)
    assert read_submission(first / "submissions" / "002").data_moved
    assert not read_submission(first / "submissions" / "001").data_moved


def test_jobs_know_their_cluster_and_those_of_another_are_left_alone(work: Path) -> None:
    pretend(work, "scontrol", 'echo "ClusterName             = here"')
    pretend(work, "scancel", f"touch {work}/cancelled")
    (run,) = submit_tiny().runs
    assert read_jobs(run)[0].cluster == "here"
    write_status(run, Status("running", step=5))
    pretend(work, "squeue", "echo '12|RUNNING|None|now|n1'")
    pretend(work, "scontrol", 'echo "ClusterName             = there"')
    with pytest.raises(UserError, match="expected the cluster here, where its job 12 is, found there"):
        cancel(run)
    assert not (work / "cancelled").exists()
    assert "its job is on the cluster here, and this is there" in view_runs([run])[0].detail
    with pytest.raises(UserError, match="job 12 of this run is running on cluster here"):
        submit(run, Path("profile.yaml"), Shape(1, 1))
    pretend(work, "scontrol", 'echo "ClusterName = here"')
    assert cancel(run) == "cancelled job 12"


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


def test_a_second_job_on_a_live_folder_leaves_every_byte_of_it_as_it_was(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = submit_tiny().runs
    folder = run / "submissions" / "001"
    begin_attempt(run, Attempt("12", 2, 4, 1.0, 0), read_budget(folder))
    write_status(run, Status("running", step=5))
    log = folder / "jobs" / "13_0_log.out"
    log.write_text("srun: error: n1: task 0: Exited with exit code 1")
    for name, value in {"PROCID": "0", "LOCALID": "0", "NTASKS": "1", "JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MTL_TRUST"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("mtl_dist.stopping.StopSignal.install", lambda self: None)
    monkeypatch.setattr("mtl_dist.stopping.StopSignal.ignore_afterwards", lambda self: None)
    with locked(run / ".lock"):
        before = contents(run)
        with pytest.raises(UserError, match="another process trains in this folder"):
            TrainingJob(run, folder)()
        with pytest.raises(ValueError), failures_recorded(run, rank=1):
            raise ValueError("rank 0 is gone")
        verdict = [str(folder), "--exit-code", "1", "--job-state", "RUNNING"]
        monkeypatch.setattr("sys.argv", ["attempts", *verdict])
        assert attempts.main() == 1
        assert contents(run) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_is_one_mistake_and_no_reason_to_try_again(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = submit_tiny().runs
    folder = run / "submissions" / "001"
    (folder / "jobs" / "12_0_log.out").write_text("")

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mtl_dist.launch.attempts.write_text", full)
    with pytest.raises(OSError), failures_recorded(run, rank=0):
        full()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    verdict = [str(folder), "--exit-code", "1", "--job-state", "RUNNING"]
    monkeypatch.setattr("sys.argv", ["attempts", *verdict])
    assert attempts.main() == 1
    said = capsys.readouterr()
    assert said.err == "" and "No space left on device. Free some space" in said.out


def test_attempts_that_slurm_itself_requeues_are_bounded_as_well(work: Path) -> None:
    (run,) = submit_tiny().runs
    budget = Budget(crashes=9, node_failures=99, without_step=3)
    for _ in range(3):
        begin_attempt(run, Attempt("12", 2, 4, 1.0, 0), budget)
        write_status(run, Status("stopped", reason="signal SIGTERM"))
    with pytest.raises(UserError, match=r"3 attempts in a row ended without a single step \(preemption\)"):
        begin_attempt(run, Attempt("12", 2, 4, 1.0, 0), budget)
    begin_attempt(run, Attempt("13", 2, 4, 1.0, 0), budget)


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
