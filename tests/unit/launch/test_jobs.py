"""Where a run stands, from its folder and from what Slurm still knows; with and without accounting."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mtl_dist.cli import app
from mtl_dist.commands.cluster import status_table
from mtl_dist.errors import UserError
from mtl_dist.launch.attempts import (
    Attempt,
    Budget,
    Ending,
    begin_attempt,
    finish_attempt,
    read_attempts,
    run_of_task,
)
from mtl_dist.launch.jobs import cancel, find_runs, follow, has_ended, log_path, view_runs
from mtl_dist.launch.look import after_look
from mtl_dist.launch.records import JobRecord, Submission, read_jobs, write_jobs, write_submission
from mtl_dist.status import State, Status, write_status

Programs = Callable[..., None]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Replaces Slurm's programs by ones that print what the test says; those it doesn't name are absent."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(**programs: str) -> None:
        for name, printed in programs.items():
            path = folder / name
            path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{printed}\n')
            path.chmod(0o755)

    monkeypatch.setattr("shutil.which", lambda name: str(folder / name) if (folder / name).exists() else None)
    return install


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was submitted as job 7."""
    folder = tmp_path / "runs" / "a"
    (folder / "submissions" / "001" / "jobs").mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    (folder / "submissions" / "001" / "submission.json").write_text('{"nodes": 2, "tasks_per_node": 2}')
    write_jobs(folder, [JobRecord("7", "train", "submissions/001")])
    return folder


def says(line: str) -> str:
    return f"echo '{line}'"


def state_of(run: Path) -> tuple[str, str]:
    (view,) = view_runs([run])
    return view.state, view.detail


def begin(run: Path, job: str = "7") -> None:
    attempt = Attempt(job, nodes=2, ranks=4, started=time.time(), first_step=0)
    begin_attempt(run, attempt, Budget(crashes=9, node_failures=9))


# -- on a cluster -----------------------------------------------------------------------------------------


def test_a_queued_run_says_what_it_waits_for(run: Path, slurm: Programs) -> None:
    slurm(squeue=says("7|PENDING|Priority|2026-01-01T10:00:00|"))
    assert state_of(run) == ("queued", "Priority, expected 2026-01-01T10:00:00")


def test_a_job_whose_ranks_have_not_spoken_yet_is_starting(run: Path, slurm: Programs) -> None:
    slurm(squeue=says("7|RUNNING|None|now|node[1-2]"))
    write_status(run, Status("stopped", step=5, updated=time.time() - 60))
    begin(run)
    assert state_of(run) == ("starting", "on node[1-2]")
    write_status(run, Status("running", step=6))
    assert state_of(run) == ("running", "on node[1-2]")


def test_requeues_are_counted_by_cause_and_only_those_of_this_job(run: Path, slurm: Programs) -> None:
    slurm(squeue=says("7|PENDING|BeginTime|N/A|"))
    for job in ("3", "7", "7", "7"):
        begin(run, job)
    (view,) = view_runs([run])
    assert view.requeues == {"node failure": 2}
    slurm(squeue=says("7|RUNNING|None|N/A|node1"))
    assert view_runs([run])[0].requeues == {"node failure": 2}


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
def test_a_run_whose_job_is_gone_is_what_it_said_last(run: Path, slurm: Programs, state: State) -> None:
    slurm(squeue="true", scontrol="exit 1")
    write_status(run, replace(Status("done"), state=state, reason="because\nof this"))
    assert state_of(run) == (state, "of this")


@pytest.mark.parametrize(
    "programs",
    [
        {"sacct": says("7|TIMEOUT|0:0"), "scontrol": says("JobId=7 JobState=COMPLETED Reason=None")},
        {
            "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
            "scontrol": says("JobId=7 JobState=TIMEOUT"),
        },
        {"scontrol": says("JobId=7 JobName=x JobState=TIMEOUT Reason=TimeLimit")},
    ],
    ids=["with accounting", "with accounting switched off", "without sacct"],
)
def test_a_run_that_vanished_failed_as_slurm_says(
    run: Path, slurm: Programs, programs: dict[str, str]
) -> None:
    slurm(squeue="true", **programs)
    write_status(run, Status("running", step=5))
    state, detail = state_of(run)
    assert state == "failed"
    assert "TIMEOUT" in detail


def test_a_vanished_run_that_slurm_has_forgotten_failed_all_the_same(run: Path, slurm: Programs) -> None:
    slurm(squeue="true", scontrol="exit 1")
    write_status(run, Status("running", step=5))
    assert state_of(run)[0] == "failed"


def test_a_job_that_was_cancelled_by_hand_is_cancelled(run: Path, slurm: Programs) -> None:
    slurm(squeue="true", sacct=says("7|CANCELLED by 0|0:15"))
    write_status(run, Status("stopped", step=5, reason="signal SIGTERM"))
    assert state_of(run)[0] == "cancelled"


@pytest.mark.parametrize("programs", [{}, {"squeue": "echo 'squeue: error: no route' >&2; exit 1"}])
def test_where_slurm_does_not_answer_the_folder_does_and_says_so(
    run: Path, slurm: Programs, programs: dict[str, str]
) -> None:
    slurm(**programs)
    write_status(run, Status("running", step=5, updated=time.time() - 300))
    state, detail = state_of(run)
    assert state == "running"
    assert "as it said 5 min ago; squeue: " in detail


def test_a_stopped_run_has_not_ended_while_slurm_cannot_say_whether_it_waits(
    run: Path, slurm: Programs
) -> None:
    write_status(run, Status("stopped", step=5, reason="signal SIGUSR2"))
    slurm(squeue="echo 'squeue: error: Socket timed out' >&2; exit 1")
    assert state_of(run)[0] == "unknown"
    assert "Socket timed out" in state_of(run)[1]
    assert not has_ended(run)
    slurm(squeue="true", sacct=says("7|COMPLETED|0:0"))
    assert has_ended(run)


@pytest.mark.parametrize(
    ("slurm_says", "cause", "words"),
    [
        ("TIMEOUT|0:0", "time limit", "at its time limit before its script had: did the ranks hang?"),
        ("FAILED|0:9", "crash", "exit code 0:9, and its batch script said nothing: was it killed?"),
        ("NODE_FAIL|0:0", "node failure", "a node of the job was lost (NODE_FAIL)"),
        ("OUT_OF_MEMORY|0:125", "crash", "it was out of memory"),
        ("PREEMPTED|0:0", "preemption", "Slurm evicted the job"),
    ],
)
def test_a_job_that_was_lost_is_named_and_submitted_again_where_the_profile_allows(
    run: Path, slurm: Programs, monkeypatch: pytest.MonkeyPatch, slurm_says: str, cause: str, words: str
) -> None:
    (run / "submissions" / "001" / "code").mkdir()
    asked = Submission(1, 2, requeue={"crashes": 3, "node_failures": 1, "resubmit": 0})
    write_submission(run / "submissions" / "001", asked)
    begin(run)
    write_status(run, Status("running", step=5))
    slurm(squeue="true", sacct=says(f"7|{slurm_says}"))
    (view,) = view_runs([run])
    assert (view.state, view.lost) == ("failed", cause) and words in view.detail
    named = after_look(view)
    assert f"`mtl submit {run} --cluster PROFILE` goes on" in named.detail
    assert [attempt.cause for attempt in read_attempts(run)] == [cause]
    assert words in view_runs([run])[0].detail

    write_submission(run / "submissions" / "001", replace(asked, requeue={**asked.requeue, "resubmit": 1}))
    slurm(sbatch=says("Submitted batch job 8"), srun="true")
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", classmethod(lambda cls: 2))
    again = after_look(view_runs([run])[0])
    assert f"submitted again as job 8 after job 7 was lost: {view.detail}" in again.detail
    assert [(job.id, job.submission, job.again) for job in read_jobs(run)] == [
        ("7", "submissions/001", False),
        ("8", "submissions/002", True),
    ]
    slurm(squeue=says("8|PENDING|Priority|N/A|"))
    assert after_look(view_runs([run])[0]).detail == "Priority"
    # What was submitted again and is lost before a step is bounded.
    begin(run, "8")
    slurm(squeue="true", sacct=says(f"8|{slurm_says}"))
    assert (
        "it was submitted again 1 time, as requeue.resubmit allows" in after_look(view_runs([run])[0]).detail
    )
    assert len(read_jobs(run)) == 2


def test_a_point_of_a_sweep_that_was_lost_is_submitted_again_with_its_chained_job(
    run: Path, slurm: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = run.parent / "submissions" / "001"
    shutil.move(run / "submissions", run.parent)
    (shared / "code").mkdir()
    write_submission(
        shared, Submission(1, 2, ["../../b", "../../a"], {"crashes": 3, "node_failures": 1, "resubmit": 1})
    )
    of_array = [
        JobRecord(f"{job}_1", kind, "../submissions/001") for job, kind in ((7, "train"), (8, "evaluate"))
    ]
    write_jobs(run, of_array)
    begin(run, "7_1")
    slurm(squeue="true", sacct=says("7_1|TIMEOUT|0:0"), sbatch=says("Submitted batch job 9"), srun="true")
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", classmethod(lambda cls: 2))
    after_look(view_runs([run])[0])
    assert [(job.id, job.kind) for job in read_jobs(run)[2:]] == [("9", "train"), ("9", "evaluate")]
    assert run_of_task(run / "submissions" / "001", {}).resolve() == run


def test_a_verdict_whose_requeue_failed_leaves_a_run_that_is_lost(run: Path, slurm: Programs) -> None:
    begin(run)
    write_status(run, Status("stopped", step=5, reason="time limit"))
    assert finish_attempt(run, Ending("7", 0, "RUNNING"), Budget(crashes=1, node_failures=1))
    slurm(squeue="true", sacct=says("7|COMPLETED|0:0"))
    (view,) = view_runs([run])
    assert (view.state, view.lost) == ("stopped", "time limit")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "slurmstepd: error: execve(): python3: No such file or directory\nsrun: error: n1: exit 2",
            "python3",
        ),
        ("line 9: apptainer: command not found\nno verdict", "apptainer: command not found"),
        ("setup failed: module load cuda (exit code 1). The ranks are not started.", "module load cuda"),
        ("something else\n\nthe last words\n", "the last words"),
        ("", "it printed nothing"),
    ],
)
def test_a_job_that_died_before_its_first_status_is_shown_with_its_cause(
    run: Path, slurm: Programs, log: str, words: str
) -> None:
    (run / "submissions" / "001" / "jobs" / "7_0_log.out").write_text(log)
    slurm(squeue="true", sacct=says("7|FAILED|127:0"))
    state, detail = state_of(run)
    assert state == "failed"
    assert "ended as FAILED with exit code 127:0 before its ranks had begun: " in detail and words in detail
    result = CliRunner().invoke(app, ["status", str(run)], env={"COLUMNS": "300"})
    assert words in result.stdout, result.output


def test_a_run_that_died_early_is_in_the_list_of_recent_ones(
    run: Path, slurm: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    slurm(squeue="true", sacct=says("7|FAILED|1:0"))
    assert "it printed nothing" in CliRunner().invoke(app, ["status"], env={"COLUMNS": "300"}).stdout


def test_what_an_earlier_job_said_is_not_the_state_of_the_newest(run: Path, slurm: Programs) -> None:
    write_status(run, Status("failed", reason="of old", updated=time.time() - 900))
    slurm(squeue="true", sacct=says("7|FAILED|1:0"))
    assert "of old" not in state_of(run)[1]


def test_a_job_that_was_cancelled_while_it_waited_says_by_whom(run: Path, slurm: Programs) -> None:
    slurm(squeue="true", sacct=says("7|CANCELLED by 0|0:0"))
    assert state_of(run) == ("cancelled", "by root while it waited")
    slurm(squeue="true", sacct="true", scontrol=says("JobId=7 JobState=CANCELLED ExitCode=0:0"))
    assert state_of(run) == ("cancelled", "while it waited")
    slurm(squeue="true", sacct="true", scontrol="true")
    assert state_of(run)[1] == "the job left the queue before it started, and Slurm has forgotten why"


def test_the_job_of_another_user_is_seen_where_squeue_lists_ones_own(run: Path, slurm: Programs) -> None:
    begin(run)
    write_status(run, Status("running", step=5))
    slurm(squeue="true", sacct=says("7|RUNNING|0:0"))
    assert view_runs([run])[0].state == "running"


def test_many_runs_ask_slurm_three_times_in_all(run: Path, slurm: Programs, tmp_path: Path) -> None:
    for number in range(20):
        other = run.parent / f"r{number}"
        other.mkdir()
        (other / "recipe.yaml").touch()
        write_jobs(other, [JobRecord(str(100 + number), "train", "submissions/001", cluster="c")])
    slurm(squeue="true", sacct="true", scontrol="true")
    view_runs(find_runs(run.parent))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4, calls  # squeue, sacct, scontrol for the name and for the jobs


def test_a_damaged_record_of_one_run_hides_no_other(run: Path, local: Path, slurm: Programs) -> None:
    slurm(squeue=says("7|PENDING|Priority|N/A|"))
    (local / "jobs.json").write_text("[{")
    views = {view.run: view for view in view_runs([run, local])}
    assert views[run].state == "queued"
    assert "jobs.json: expected the run's jobs, found a damaged file" in views[local].detail


def test_cancelling_ends_every_job_of_the_run_and_is_remembered(
    run: Path, slurm: Programs, tmp_path: Path
) -> None:
    evaluation = JobRecord("8", "evaluate", "submissions/001")
    write_jobs(run, [JobRecord("3", "train", "submissions/001"), *read_jobs(run), evaluation])
    slurm(squeue="echo '7|RUNNING|None|now|n1'; echo '8|PENDING|Dependency|N/A|'", scancel="true")
    assert cancel(run) == "cancelled job 7, 8"
    assert "7 8" in (tmp_path / "calls").read_text().splitlines()
    assert [job.id for job in read_jobs(run) if job.cancelled is not None] == ["7", "8"]
    slurm(squeue="true")
    write_status(run, Status("stopped", step=5, reason="signal SIGTERM"))
    assert state_of(run)[0] == "cancelled"


def test_nothing_to_cancel_is_said(run: Path, slurm: Programs) -> None:
    slurm(squeue="true")
    with pytest.raises(UserError, match="expected a job that waits or runs"):
        cancel(run)


def test_each_rank_has_a_log_and_a_rank_that_does_not_exist_is_refused(run: Path, slurm: Programs) -> None:
    jobs = run / "submissions" / "001" / "jobs"
    slurm(squeue=says("7|PENDING|Priority|N/A|"))
    with pytest.raises(UserError, match=r"nothing has been printed yet; it is queued \(Priority\)"):
        log_path(run, None)
    for rank in range(4):
        (jobs / f"7_{rank}_log.out").touch()
    assert log_path(run, None) == jobs / "7_0_log.out"
    assert log_path(run, 3) == jobs / "7_3_log.out"
    with pytest.raises(UserError, match="expected 0 to 3, found 4"):
        log_path(run, 4)


# -- on this machine --------------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print('up', flush=True)"
    process = subprocess.Popen([sys.executable, "-c", f"{code}\ntime.sleep(60)"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "b"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    return folder


def test_a_local_run_is_running_while_its_process_lives(
    local: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    write_status(local, Status("running", pid=sleeper.pid))
    assert state_of(local) == ("running", f"process {sleeper.pid}")
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait()
    assert state_of(local) == ("failed", "its process is gone")


def test_a_later_process_of_the_same_number_is_not_the_run(local: Path) -> None:
    write_status(local, Status("running", pid=os.getpid(), updated=1.0))
    assert state_of(local)[0] == "failed"


def test_a_run_on_another_machine_is_believed_for_what_it_said(local: Path) -> None:
    write_status(local, Status("running", host="elsewhere", updated=time.time() - 10))
    state, detail = state_of(local)
    assert state == "running" and re.fullmatch("on elsewhere, as it said 1[0-9] s ago", detail)
    with pytest.raises(UserError, match="it runs on elsewhere"):
        cancel(local)


def test_cancelling_a_local_run_asks_it_to_save_and_stop(
    local: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    write_status(local, Status("running", pid=sleeper.pid))
    cancel(local)
    assert sleeper.wait(timeout=10) == 7


def test_a_local_run_has_one_log_for_all_ranks(local: Path) -> None:
    (local / "log.txt").write_text("hello")
    assert log_path(local, None) == local / "log.txt"
    with pytest.raises(UserError, match="--rank"):
        log_path(local, 0)
    with pytest.raises(UserError, match="nowhere: expected a run folder, found no such directory"):
        log_path(local / "nowhere", None)


# -- finding and following --------------------------------------------------------------------------------


def test_runs_are_found_below_any_folder_but_not_inside_of_one_another(run: Path, local: Path) -> None:
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "checkpoints" / "step_1" / "recipe.yaml").touch()
    assert find_runs(run.parent) == [run, local]
    assert find_runs(local) == [local]
    assert find_runs(local / "nowhere") == []


def test_following_a_log_misses_nothing_that_was_written_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one ")
    writes = iter(["two ", "three "])

    def ended() -> bool:
        text = next(writes, None)
        if text is not None:
            with path.open("a") as file:
                file.write(text)
        return text is None

    assert "".join(follow(path, ended, poll_s=0.0)) == "one two three "


def test_the_table_shows_the_speed_only_of_what_runs(local: Path, sleeper: subprocess.Popen[bytes]) -> None:
    going = Status("running", step=5, total_steps=10, position=50, end_position=100, images_per_s=25.0)
    write_status(local, replace(going, pid=sleeper.pid, host=platform.node(), metric="val/loss", best=0.25))
    cells = [
        list(map(str, column.cells)) for column in status_table(view_runs([local]), local.parent).columns
    ]
    assert [cell for (cell,) in cells] == [
        "b",
        "",
        "running",
        "5/10",
        "0.00",
        "25",
        "0:00:02",
        "val/loss 0.2500",
    ]
    write_status(local, replace(going, state="stopped"))
    cells = [
        list(map(str, column.cells)) for column in status_table(view_runs([local]), local.parent).columns
    ]
    assert [cell for (cell,) in cells] == ["b", "", "stopped", "5/10", "0.00", "", "", ""]
