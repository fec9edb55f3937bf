"""What the environment says of the processes that were started: by a launcher, by Slurm, or left over.

A launcher tells each process the size of the group (`WORLD_SIZE`), its rank and where they meet. Some of it
without the rest comes from a shell or a job script that once set it: such a process would wait for others
that nobody started.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping

import psutil

from mtl_dist.errors import UserError

_LINGER_S = 3
"""So long a task that is about to be refused stays, so that the others see that they are several."""

_LAUNCHERS = "`mtl launch`, `torchrun` or `accelerate launch`"


def launched_size(environment: Mapping[str, str]) -> int:
    """The number of processes that the launcher says it started (1 without a launcher).

    Raises:
        UserError: the variables of a launcher contradict one another, or some are missing.
    """
    size = _whole_number(environment, "WORLD_SIZE", 1)
    ranks = {name: _whole_number(environment, name, 0) for name in ("RANK", "LOCAL_RANK")}
    if size is None or size < 1:
        raise _left_over(environment, "WORLD_SIZE", "a number of processes")
    for name, rank in ranks.items():
        if rank is None or not 0 <= rank < size:
            of = f"WORLD_SIZE {size}" if "WORLD_SIZE" in environment else "no WORLD_SIZE"
            raise _left_over(environment, name, f"a rank from 0 to {size - 1} ({of})")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE: expected a launcher's {', '.join(missing)} beside WORLD_SIZE {size}, found none. "
            f"Start with {_LAUNCHERS}, or `unset WORLD_SIZE` for one process."
        )
    return size


def check_slurm_step(environment: Mapping[str, str], tasks_around: Callable[[], int] | None = None) -> None:
    """Refuse several tasks of srun that know nothing of one another: each would train on its own.

    Where the environment was emptied (`env -i`, `apptainer --cleanenv`) `tasks_around` looks at the processes
    around this one.

    Raises:
        UserError: srun started several tasks, and nobody said which rank each is.
    """
    if (_whole_number(environment, "WORLD_SIZE", 1) or 1) > 1:
        return
    tasks = _whole_number(environment, "SLURM_STEP_NUM_TASKS", 0)
    if not tasks:
        tasks = (tasks_around or slurm_tasks_around)()
    if tasks > 1:
        raise UserError(
            f"srun: expected one task, or ranks that a launcher numbers, found {tasks} tasks without "
            "WORLD_SIZE: each would train on its own. Type `mtl submit RECIPE --cluster PROFILE "
            f"--tasks-per-node {tasks}`, or in one task (srun -n 1) `mtl launch RECIPE --nproc {tasks}`."
        )


def slurm_tasks_around() -> int:
    """The tasks of the srun that started this process, from the processes of this machine; 0 without one.

    Tasks on other nodes are known if Slurm says so. Within a container that has process numbers of its own
    nothing is seen.
    """
    try:
        daemon = next((each for each in psutil.Process().parents() if each.name() == "slurmstepd"), None)
        if daemon is None:
            return 0
        here = len(daemon.children())
        step = re.search(r"\[(\d+\.\d+)\]", " ".join(daemon.cmdline()))
    except psutil.Error:
        return 0
    tasks = here if step is None else max(here, _tasks_of_step(step[1]))
    if tasks > 1:
        time.sleep(_LINGER_S)
    return tasks


def _tasks_of_step(step: str) -> int:
    program = shutil.which("scontrol", path=f"{os.environ.get('PATH', '')}:{os.defpath}:/usr/local/bin")
    if program is None:
        return 0
    command = [program, "--oneliner", "show", "step", step]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r"\bTasks=(\d+)", said)
    return int(found[1]) if found else 0


def unused_slurm_tasks(environment: Mapping[str, str]) -> str:
    """What to say where a Slurm job has tasks that no srun and no launcher starts; else nothing."""
    tasks = _whole_number(environment, "SLURM_NTASKS", 1)
    if tasks is None or tasks < 2 or "WORLD_SIZE" in environment or "SLURM_STEP_NUM_TASKS" in environment:
        return ""
    return (
        f"this Slurm job has {tasks} tasks, and the run was started as one process, without srun: the others "
        f"do nothing. Use `mtl submit`, or start with {_LAUNCHERS}."
    )


def own_rank(environment: Mapping[str, str]) -> int:
    """The rank of this process, 0 without a launcher or where it is no number."""
    return _whole_number(environment, "RANK", 0) or 0


def own_size(environment: Mapping[str, str]) -> int:
    """The processes that the launcher started on this machine, 0 without one or where it is no number."""
    return _whole_number(environment, "LOCAL_WORLD_SIZE", 0) or 0


def _whole_number(environment: Mapping[str, str], name: str, default: int) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return default
    return int(text) if text.removeprefix("-").isdecimal() else None


def _left_over(environment: Mapping[str, str], name: str, expected: str) -> UserError:
    return UserError(
        f"{name}: expected {expected}, found {environment[name]!r} in the environment, which no launcher "
        f"sets. Start with {_LAUNCHERS}, or `unset {name}`."
    )
