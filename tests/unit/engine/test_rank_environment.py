"""What a launcher left in the environment is read, or refused in one line: nobody waits for processes that
were never started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtl_dist.engine.rank_environment import (
    check_slurm_step,
    launched_size,
    own_rank,
    own_size,
    slurm_tasks_around,
    unused_slurm_tasks,
)
from mtl_dist.errors import UserError

ROOT = Path(__file__).parents[3]
TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 1),
        (TORCHRUN, 2),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1),
        ({"WORLD_SIZE": ""}, 1),
        ({"LOCAL_RANK": "0"}, 1),
    ],
)
def test_the_size_is_what_the_launcher_says(environment: dict[str, str], size: int) -> None:
    assert launched_size(environment) == size


@pytest.mark.parametrize(
    ("left_over", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "a launcher's RANK, MASTER_ADDR, MASTER_PORT beside WORLD_SIZE 2"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "a launcher's MASTER_PORT beside"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number of processes, found 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a number"),
        ({"RANK": "3"}, r"RANK: expected a rank from 0 to 0 \(no WORLD_SIZE\), found '3'"),
        ({**TORCHRUN, "RANK": "2"}, "RANK: expected a rank from 0 to 1"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK: expected a rank"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK: expected a rank from 0 to 0"),
    ],
)
def test_what_is_left_over_is_refused_in_one_line_with_the_remedy(
    left_over: dict[str, str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        launched_size(left_over)
    assert "\n" not in str(caught.value)
    assert "unset" in str(caught.value)


def test_tasks_of_srun_that_nobody_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="found 4 tasks without WORLD_SIZE"):
        check_slurm_step({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"})
    check_slurm_step({"SLURM_STEP_NUM_TASKS": "1"})
    check_slurm_step({"SLURM_STEP_NUM_TASKS": "2", **TORCHRUN})
    # One process to a launcher, and left over from a job script: each task would still train on its own.
    with pytest.raises(UserError, match=r"srun -n 1\) `mtl launch RECIPE --nproc 2`"):
        check_slurm_step({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "1", "RANK": "0"})


def test_tasks_whose_environment_was_emptied_are_found_around_the_process() -> None:
    with pytest.raises(UserError, match="found 2 tasks"):
        check_slurm_step({}, lambda: 2)
    check_slurm_step({}, lambda: 0)
    check_slurm_step({"SLURM_STEP_NUM_TASKS": "1"}, lambda: 2)
    check_slurm_step(TORCHRUN, lambda: 2)
    assert slurm_tasks_around() == 0


def test_the_tasks_of_a_step_are_the_children_of_its_daemon(tmp_path: Path) -> None:
    """A process that is called as Slurm's daemon is, with two tasks below it, whose environment is empty."""
    daemon = tmp_path / "slurmstepd"
    daemon.symlink_to("/bin/sh")
    code = "from mtl_dist.engine.rank_environment import slurm_tasks_around; print(slurm_tasks_around())"
    task = f"env -i PYTHONPATH={ROOT} {sys.executable} -c '{code}'"
    command = [daemon, "-c", f"{task} & (exec sleep 20) & wait %1; kill %2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


def test_tasks_that_nobody_starts_are_named() -> None:
    assert "has 4 tasks" in unused_slurm_tasks({"SLURM_NTASKS": "4"})
    for fine in ({}, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "2", **TORCHRUN}, {"SLURM_NTASKS": "x"}):
        assert unused_slurm_tasks(fine) == ""


def test_a_rank_that_is_no_number_does_not_hide_the_message() -> None:
    assert own_rank({"RANK": "x"}) == 0
    assert own_rank({"RANK": "3"}) == 3
    assert own_size({"LOCAL_WORLD_SIZE": "two"}) == own_size({}) == 0
    assert own_size({"LOCAL_WORLD_SIZE": "2"}) == 2
