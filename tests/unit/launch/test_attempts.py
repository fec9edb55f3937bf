"""The verdict over an attempt: its cause, and whether another one follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mtl_dist.errors import UserError
from mtl_dist.launch import attempts
from mtl_dist.launch.attempts import (
    Attempt,
    Budget,
    Ending,
    begin_attempt,
    finish_attempt,
    first_killed,
    limit_from,
    read_attempts,
    record_failure,
)
from mtl_dist.launch.records import Submission
from mtl_dist.status import Status, read_status, write_status

BUDGET = Budget(crashes=2, node_failures=1)
FINE = Ending("7", 0, "RUNNING")
CRASHED = Ending("7", 1, "RUNNING")


def attempt(first_step: int = 0) -> Attempt:
    return Attempt("7", nodes=2, ranks=4, started=1.0, first_step=first_step)


def begin(run: Path, first_step: int = 0) -> None:
    begin_attempt(run, attempt(first_step), BUDGET)


def test_a_finished_run_is_not_started_again(tmp_path: Path) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("done", step=10))
    assert not finish_attempt(tmp_path, FINE, BUDGET)
    assert [past.cause for past in read_attempts(tmp_path)] == ["done"]


def test_what_dies_while_it_cleans_up_after_the_end_changes_nothing(tmp_path: Path) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("done", step=10))
    assert not finish_attempt(tmp_path, replace(CRASHED, killed="rank 1 on n: Killed"), BUDGET)
    assert read_attempts(tmp_path)[-1].cause == "done"


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("time limit", "time limit"),
        ("signal SIGUSR2", "preemption"),
        ("signal SIGTERM", "preemption"),
    ],
)
def test_a_stop_is_requeued_and_named(tmp_path: Path, reason: str, cause: str) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=10, reason=reason))
    assert finish_attempt(tmp_path, FINE, BUDGET)
    (only,) = read_attempts(tmp_path)
    assert (only.cause, only.last_step) == (cause, 10)


def test_stops_never_eat_the_budget_of_crashes(tmp_path: Path) -> None:
    for step in range(1, 60):
        begin(tmp_path, step - 1)
        write_status(
            tmp_path, Status("stopped", step=step, reason="signal SIGUSR2" if step % 2 else "time limit")
        )
        assert finish_attempt(tmp_path, FINE, BUDGET)
    begin(tmp_path, 59)
    record_failure(tmp_path, 0, RuntimeError("bad luck"))
    assert finish_attempt(tmp_path, CRASHED, BUDGET)


def test_a_person_who_interrupts_a_run_means_it(tmp_path: Path) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=10, reason="signal SIGINT"))
    assert not finish_attempt(tmp_path, FINE, BUDGET)
    status = read_status(tmp_path)
    assert status is not None and status.state == "stopped"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_itself_ends_is_left_to_slurm(tmp_path: Path, state: str) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=10, reason="signal SIGTERM"))
    assert not finish_attempt(tmp_path, Ending("7", 0, state), BUDGET)
    status = read_status(tmp_path)
    assert status is not None and status.state == "stopped"


def test_crashes_are_started_again_up_to_the_budget_and_then_the_run_says_why_not(tmp_path: Path) -> None:
    for step in (10, 20):
        begin(tmp_path, step - 10)
        write_status(tmp_path, Status("running", step=step))
        record_failure(tmp_path, 3, RuntimeError(f"bad luck at {step}"))
        assert finish_attempt(tmp_path, CRASHED, BUDGET)
    begin(tmp_path, 20)
    write_status(tmp_path, Status("running", step=30))
    record_failure(tmp_path, 3, RuntimeError("bad luck at 30"))
    assert not finish_attempt(tmp_path, CRASHED, BUDGET)
    status = read_status(tmp_path)
    assert status is not None and status.state == "failed"
    assert "rank 3: RuntimeError: bad luck at 30" in status.reason
    assert "more than requeue.crashes (2)" in status.reason


def test_a_crash_that_repeats_at_the_same_step_ends_the_run(tmp_path: Path) -> None:
    for wanted in (True, False):
        begin(tmp_path)
        write_status(tmp_path, Status("running", step=10))
        record_failure(tmp_path, 1, RuntimeError("boom"))
        assert finish_attempt(tmp_path, CRASHED, Budget(crashes=99, node_failures=1)) is wanted
    status = read_status(tmp_path)
    assert status is not None and "twice in the same way at step 10" in status.reason


def test_the_same_crash_with_a_stop_in_between_is_another_chance(tmp_path: Path) -> None:
    def crash() -> bool:
        begin(tmp_path)
        write_status(tmp_path, Status("running", step=10))
        record_failure(tmp_path, 1, RuntimeError("boom"))
        return finish_attempt(tmp_path, CRASHED, BUDGET)

    assert crash()
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=5, reason="signal SIGUSR2"))
    assert finish_attempt(tmp_path, FINE, BUDGET)
    assert crash()


@pytest.mark.parametrize(("left_s", "cause"), [(239, "time limit"), (241, "preemption")])
def test_slurms_signal_is_the_time_limit_near_the_end_and_a_preemption_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: int, cause: str
) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=5, reason="signal SIGUSR2", updated=1_000.0))
    asked = Submission(1, 1, profile={"signal_lead_s": 180})
    limit = limit_from({"MTL_END_TIME": str(1_000 + left_s)}, asked)
    assert finish_attempt(tmp_path, replace(FINE, limit_from=limit), BUDGET)
    assert read_attempts(tmp_path)[-1].cause == cause
    assert limit_from({"MTL_END_TIME": ""}, asked) == float("inf")


def test_a_run_that_saved_while_slurm_ended_its_job_at_the_limit_ended_by_the_time_limit(
    tmp_path: Path,
) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=5, reason="signal SIGTERM"))
    assert not finish_attempt(tmp_path, Ending("7", 0, "COMPLETING", at_limit=True), BUDGET)
    (only,) = read_attempts(tmp_path)
    assert (only.cause, only.reason) == ("time limit", "signal SIGTERM, at the time limit")


def test_a_rank_that_dies_with_its_node_is_no_crash(tmp_path: Path) -> None:
    begin(tmp_path)
    log = (
        f"{attempts.STARTED}\nsrun: error: n2: task 2: Killed\n"
        "srun: error: Task launch for StepId=7.1 failed on node n2: Communication connection failure\n"
    )
    ending = replace(CRASHED, killed=first_killed(log), lost=attempts.lost_node(log))
    assert finish_attempt(tmp_path, ending, BUDGET)
    (only,) = read_attempts(tmp_path)
    assert (only.cause, only.reason) == ("node failure", "n2 does not answer")


def test_a_mistake_of_the_user_is_not_tried_twice(tmp_path: Path) -> None:
    begin(tmp_path)
    record_failure(tmp_path, 0, UserError("train.global_batch: expected ..."))
    assert not finish_attempt(tmp_path, CRASHED, BUDGET)
    status = read_status(tmp_path)
    assert status is not None and status.state == "failed" and not status.retry
    assert status.reason == "mtl_dist.errors.UserError: train.global_batch: expected ..."


def test_the_first_failure_is_the_cause_and_the_others_are_echoes(tmp_path: Path) -> None:
    begin(tmp_path)
    record_failure(tmp_path, 2, RuntimeError("the cause"))
    record_failure(tmp_path, 0, RuntimeError("Connection closed by peer"))
    finish_attempt(tmp_path, CRASHED, BUDGET)
    assert read_attempts(tmp_path)[-1].reason == "rank 2: RuntimeError: the cause"


def test_a_killed_rank_is_the_cause_and_the_errors_of_the_others_are_echoes(tmp_path: Path) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("running", step=10))
    record_failure(tmp_path, 0, RuntimeError("Connection closed by peer"))
    assert finish_attempt(tmp_path, replace(CRASHED, killed="rank 2 on node2: Killed"), BUDGET)
    (only,) = read_attempts(tmp_path)
    assert (only.cause, only.reason) == ("crash", "rank 2 on node2: Killed (out of memory?)")


def test_a_failure_of_an_earlier_attempt_is_forgotten(tmp_path: Path) -> None:
    begin(tmp_path)
    record_failure(tmp_path, 2, RuntimeError("the cause"))
    finish_attempt(tmp_path, CRASHED, BUDGET)
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=11, reason="signal SIGUSR2"))
    finish_attempt(tmp_path, FINE, BUDGET)
    assert [past.cause for past in read_attempts(tmp_path)] == ["crash", "preemption"]


def test_a_status_from_before_the_attempt_does_not_judge_it(tmp_path: Path) -> None:
    write_status(tmp_path, Status("stopped", step=5, reason="signal SIGUSR2", updated=0.5))
    begin(tmp_path)
    assert finish_attempt(tmp_path, CRASHED, BUDGET)
    assert read_attempts(tmp_path)[-1].cause == "crash"


def test_a_signal_that_comes_before_the_ranks_have_begun_is_a_preemption(tmp_path: Path) -> None:
    ending = Ending("7", 140, "RUNNING", killed="rank 0 on node1: User defined signal 2")
    assert finish_attempt(tmp_path, ending, BUDGET)
    assert read_attempts(tmp_path)[-1].cause == "preemption"


def test_a_job_that_never_begins_is_given_up(tmp_path: Path) -> None:
    ending = Ending("7", 140, "RUNNING", killed="rank 0 on node1: User defined signal 2")
    assert [finish_attempt(tmp_path, ending, BUDGET) for _ in range(3)] == [True, True, False]


def test_two_time_limits_without_a_step_end_the_run(tmp_path: Path) -> None:
    def time_out() -> bool:
        begin(tmp_path, 5)
        write_status(tmp_path, Status("stopped", step=5, reason="time limit"))
        return finish_attempt(tmp_path, FINE, BUDGET)

    assert [time_out(), time_out()] == [True, False]


def test_attempts_without_a_step_are_bounded_whatever_their_cause(tmp_path: Path) -> None:
    def preempted(step: int) -> bool:
        begin(tmp_path, 5)
        write_status(tmp_path, Status("stopped", step=step, reason="signal SIGUSR2"))
        return finish_attempt(tmp_path, FINE, BUDGET)

    assert [preempted(5) for _ in range(4)] == [True] * 4
    assert preempted(6), "a step begins the count again"
    assert [preempted(5) for _ in range(5)] == [True] * 4 + [False]
    status = read_status(tmp_path)
    assert status is not None
    assert status.reason.startswith("5 attempts in a row ended without a single step (preemption)")


def test_a_rank_that_was_ended_for_a_hang_is_a_crash_with_that_reason(tmp_path: Path) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("failed", step=3, reason="hang: rank 1 stayed in the forward, step 4"))
    assert finish_attempt(tmp_path, CRASHED, BUDGET)
    last = read_attempts(tmp_path)[-1]
    assert (last.cause, last.reason) == ("crash", "hang: rank 1 stayed in the forward, step 4")


def test_an_attempt_that_nobody_closed_was_lost_with_its_node(tmp_path: Path) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("running", step=10))
    begin(tmp_path, 10)
    assert [past.cause for past in read_attempts(tmp_path)] == ["node failure", "running"]


def test_nodes_may_fail_up_to_the_bound(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path)
    with pytest.raises(UserError, match=r"requeue\.node_failures"):
        begin(tmp_path)


def test_an_open_attempt_that_had_saved_was_preempted(tmp_path: Path) -> None:
    begin(tmp_path)
    write_status(tmp_path, Status("stopped", step=10, reason="signal SIGTERM"))
    begin(tmp_path, 10)
    assert read_attempts(tmp_path)[0].cause == "preemption"


@pytest.mark.parametrize(
    ("log", "killed"),
    [
        (
            "srun: error: n2: task 2: Killed\nsrun: error: n1: tasks 0-1: Exited with exit code 1",
            "rank 2 on n2: Killed",
        ),
        ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 2: Terminated", ""),
        (f"srun: error: n2: task 2: Killed\n{attempts.STARTED}\nall is well", ""),
        ("", ""),
    ],
)
def test_the_first_rank_to_end_in_this_attempt_is_the_one_that_matters(log: str, killed: str) -> None:
    assert first_killed(log) == killed


def test_the_batch_script_learns_by_exit_code_whether_to_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submission: Callable[[list[str]], Path]
) -> None:
    folder = submission(["../run-a", "../run-b"])
    (folder / "jobs").mkdir()
    (folder / "jobs" / "7_1_0_log.out").write_text(attempts.STARTED)
    begin(tmp_path / "run-b")
    write_status(tmp_path / "run-b", Status("stopped", step=3, reason="time limit"))
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    arguments = ["attempts", str(folder), "--exit-code", "0", "--job-state", "RUNNING None"]
    monkeypatch.setattr("sys.argv", arguments)
    assert attempts.main() == 0
    assert read_attempts(tmp_path / "run-a") == []
    write_status(tmp_path / "run-b", Status("done", step=3))
    begin(tmp_path / "run-b")
    write_status(tmp_path / "run-b", Status("done", step=3))
    assert attempts.main() == 1


@pytest.fixture
def submission(tmp_path: Path) -> Callable[[list[str]], Path]:
    def make(runs: list[str]) -> Path:
        folder = tmp_path / "submission"
        folder.mkdir()
        for run in runs:
            (folder / run).mkdir()
        facts: dict[str, object] = {"nodes": 1, "tasks_per_node": 1, "runs": runs}
        facts |= {"requeue": {"crashes": 2, "node_failures": 1}}
        (folder / "submission.json").write_text(json.dumps(facts))
        return folder

    return make
