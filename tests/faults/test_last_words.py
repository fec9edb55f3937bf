"""A mistake is always said: whichever rank ends first, its lines have been printed before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RANKS = """
import os, pathlib, sys, time
from mtl_dist.commands import errors
from mtl_dist.errors import UserError

errors.SECONDS_FOR_RANK_0 = 1.0
children = []
for rank in range(3):
    child = os.fork()
    if child == 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
        time.sleep({delays}[rank])
        errors.report(UserError({messages}[rank]))
        os._exit(2)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def ended(tmp_path: Path, delays: list[float], messages: list[str]) -> tuple[str, list[str]]:
    """Three ranks of one launcher that end by a mistake: their exit codes, and the lines printed."""
    script = RANKS.format(delays=delays, messages=messages)
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ)
    return done.stdout.strip(), sorted(done.stderr.splitlines())


@pytest.mark.parametrize(
    ("delays", "messages", "lines"),
    [
        ([0, 0, 0], ["a", "a", "a"], ["a"]),
        ([0.3, 0, 0], ["a", "a", "a"], ["a"]),
        ([0, 0, 0], ["a", "a", "b"], ["a", "rank 2: b"]),
    ],
)
def test_ranks_with_one_mistake_print_it_once(
    tmp_path: Path, delays: list[float], messages: list[str], lines: list[str]
) -> None:
    assert ended(tmp_path, delays, messages) == ("[2, 2, 2]", lines)
    assert list(tmp_path.iterdir()) == []


def test_where_rank_0_is_late_another_rank_has_spoken_before_it_ends(tmp_path: Path) -> None:
    codes, lines = ended(tmp_path, [3, 0, 0], ["a", "a", "a"])
    assert codes == "[2, 2, 2]"
    assert len(lines) == 1
    assert lines[0] in ("rank 1: a", "rank 2: a")


def test_a_rank_that_is_killed_while_it_speaks_has_another_speak(tmp_path: Path) -> None:
    killed = RANKS.replace(
        "        errors.report(",
        "        if rank == 0:\n"
        "            errors._print = lambda lines: os.kill(os.getpid(), 9)\n"
        "        errors.report(",
    ).format(delays=[0, 0, 0], messages=["a", "a", "a"])
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True, env=environ)
    assert done.stdout.strip() == f"[{-signal.SIGKILL}, 2, 2]"
    assert done.stderr in ("rank 1: a\n", "rank 2: a\n")


LATE = """
import os, sys, time
from mtl_dist.commands import errors
from mtl_dist.errors import UserError

errors.SECONDS_FOR_RANK_0 = 0.2
time.sleep(100 if os.environ["RANK"] == "0" else 0)
errors.report(UserError("a.b: expected"))
sys.exit(2)
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"],
    "accelerate": ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "ddp-cpu.yaml")],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.exhaustive)])
def test_under_other_launchers_the_line_is_printed_before_they_end_the_rank_that_is_late(
    tmp_path: Path, launcher: str
) -> None:
    """Their own exit code is 1, and a page of theirs follows it."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environ = {key: value for key, value in os.environ.items() if key not in known}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(script)],
        capture_output=True,
        text=True,
        env={**environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=200,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines().count("rank 1: a.b: expected") == 1, done.stderr


def test_ranks_that_srun_starts_each_end_with_exit_code_2_and_one_line(tmp_path: Path) -> None:
    """Nobody ends the others there; every rank has one parent, as under a node's slurmstepd."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "tasks: {digit: {kind: classification}}\ndata: {train: [{path: nowhere}]}\noptim: {rl: 1}\n"
    )
    command = f"{sys.executable} -m mtl_dist train {recipe}"
    ranks = [
        f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 SLURM_PROCID={rank} "
        f"SLURM_STEP_NUM_TASKS=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1 {command} & r{rank}=$!"
        for rank in (1, 0)
    ]
    script = "; ".join(ranks).replace("& r1=$!;", "& r1=$!\n") + "\nwait $r0; a=$?; wait $r1; echo $a $?"
    environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environ, timeout=200)
    assert done.stdout.split() == ["2", "2"]
    lines = done.stderr.splitlines()
    assert sum("optim.rl" in line for line in lines) == 1 and len(set(lines)) == len(lines), done.stderr
