"""The batch script: a cluster profile and the shape of a job as submitit's parameters.

The script runs once, on the first node. It loads modules, chooses the rendezvous, starts the ranks with one
srun, and when they have ended asks `attempts.py` whether to requeue the job:

    setup     environment of the snapshot, modules, port, end time
    command   srun ... python -m submitit.core._submit FOLDER        (submitit)
    teardown  python -m mtl_dist.launch.attempts ... && scontrol requeue, again if the controller is busy
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from mtl_dist.launch.attempts import STARTED
from mtl_dist.launch.profile import ClusterProfile, Prefix, Pyxis

# A dead rank ends the step at once; a rank that lags behind the first to finish has this long.
SRUN_ARGS = ("--kill-on-bad-exit=1", "--wait=60")

# Bash runs a trap only after the foreground srun has ended, so the script lives to give its verdict.
KEEP_THE_SHELL = "trap 'echo \"the batch script was asked to end\"' USR1 USR2 TERM"

# Below 32768 begin the ports that outgoing connections are given: one of those may be taken at any moment.
CHOOSE_PORT = """\
while MASTER_PORT=$((20000 + RANDOM % 10000))
      (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do :; done
export MASTER_PORT"""

# The last task of an array has the array's own number as SLURM_JOB_ID, which means all of its tasks.
NAME_THE_JOB = (
    "JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; JOB=${JOB:-$SLURM_JOB_ID}"
)

# What modules and setup do not bring, the ranks would miss in ways that are hard to read.
ON_FAILURE = (
    "trap 'echo \"setup failed: $BASH_COMMAND (exit code $?). The ranks are not started.\"; exit 1' ERR"
)
TRUST_AGAIN = "trap - ERR"

# A busy controller does not answer every time, and a run must not end because of that.
TRY_AGAIN = """\
persist() {
  "$@" || { sleep 5; "$@"; } || { sleep 20; "$@"; } || { sleep 60; "$@"; }
}"""

# When a rank dies, srun has the others ended by a message whose receiver waits for KillWait (30 s). Slurm
# holds it for lost after MessageTimeout (10 s) and repeats it a minute later, when the next attempt trains,
# to a step of that number, which is 0 again after a requeue. So each attempt's ranks are another step.
ANOTHER_STEP = """\
for ((step = 0; step < ${SLURM_RESTART_COUNT:-0} % 8; step++)); do
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 true
done"""

# The verdict is given once, whatever is sent to the script now: its programs ignore what it ignores.
DEAF = "trap '' USR1 USR2 TERM"

# Ranks that die with their node look as if they had crashed: does every node start an empty task?
PROBE = """\
if ((code && SLURM_JOB_NUM_NODES > 1)); then
  timeout 30 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \\
    --ntasks-per-node=1 true
fi"""

JOB_STATE = 'persist squeue --noheader --job "$JOB" --format "%T %r"'
# `date` reads an empty text as today's midnight, and cannot read NONE, the end of a job without a limit.
END_TIME = 'end=$(persist squeue --noheader --job "$JOB" --format %e) && date +%s -d "$end" 2>/dev/null'


@dataclass(frozen=True)
class Shape:
    """How many ranks, and where: `nodes` x `tasks_per_node`."""

    nodes: int
    tasks_per_node: int


class ScriptExecutor(SlurmExecutor):
    """submitit's executor where no Slurm is installed: good for printing the script only."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def build_executor(
    folder: Path,
    name: str,
    profile: ClusterProfile,
    shape: Shape,
    *,
    verdict: bool = True,
    dry_run: bool = False,
    **more: Any,
) -> SlurmExecutor:
    """An executor that submits to the profile's cluster; `more` are further parameters of submitit's.

    Without `verdict` the job is never requeued by its batch script: it has nothing to go on with.
    """
    executor_class = ScriptExecutor if dry_run else SlurmExecutor
    executor = executor_class(folder=folder / "jobs", python=python_command(profile))
    parameters = slurm_parameters(folder, name, profile, shape)
    if not verdict:
        parameters["teardown"] = []
    executor.update_parameters(**parameters, **more)
    return executor


def script_text(executor: SlurmExecutor) -> str:
    """The batch script that the executor would submit."""
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def slurm_parameters(folder: Path, name: str, profile: ClusterProfile, shape: Shape) -> dict[str, Any]:
    """What submitit passes on to sbatch and srun."""
    named = {"partition": profile.partition, "account": profile.account, "qos": profile.qos}
    named["constraint"] = profile.constraint
    parameters: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if profile.gpus_per_task:
        parameters["gpus_per_node"] = profile.gpus_per_task * shape.tasks_per_node
    if profile.memory_gb is not None:
        parameters["mem"] = f"{profile.memory_gb}G"
    return parameters | {
        "job_name": name,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "time": -(-profile.time_limit_s // 60),
        "signal_delay_s": profile.signal_lead_s,
        # submitit names its own, which a cluster may not know; a profile's is among the options of sbatch.
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": setup_lines(folder, profile, shape),
        "teardown": teardown_lines(folder, profile),
        # srun has ignored sbatch's --cpus-per-task since Slurm 22.05 and would give each rank one CPU.
        "srun_args": [
            *SRUN_ARGS,
            f"--cpus-per-task={profile.cpus_per_task}",
            *_container_args(profile),
            *profile.srun,
        ],
        "additional_parameters": {"requeue": True, **profile.sbatch},
    }


def setup_lines(folder: Path, profile: ClusterProfile, shape: Shape) -> list[str]:
    """What the script does before it starts the ranks."""
    lines = [
        KEEP_THE_SHELL,
        TRY_AGAIN,
        NAME_THE_JOB,
        # The snapshot comes before what is installed and before the working directory.
        f'export PYTHONPATH={shlex.quote(str(folder / "code"))}:"$PWD":"$PYTHONPATH" PYTHONSAFEPATH=1',
        ON_FAILURE,
        *(f"module load {shlex.quote(module)}" for module in profile.modules),
        TRUST_AGAIN,
        *(f"export {key}={with_variables(value)}" for key, value in profile.environment.items()),
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{profile.cpus_per_task}}}",
    ]
    if profile.network_interface is not None:
        interface = shlex.quote(profile.network_interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={interface} GLOO_SOCKET_IFNAME={interface}")
    lines += [
        # Whoever gave the waiting job other nodes (scontrol update NumNodes=1 NumTasks=4) did not change what
        # Slurm gives srun: still the number of tasks at submission.
        f"export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * {shape.tasks_per_node}))",
        "export SLURM_NPROCS=$SLURM_NTASKS",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        CHOOSE_PORT,
        f"export MTL_END_TIME=${{SLURM_JOB_END_TIME:-$({END_TIME})}} MTL_SAVE_MARGIN={profile.save_margin_s}",
        *([ON_FAILURE, *profile.setup, TRUST_AGAIN] if profile.setup else []),
        ANOTHER_STEP,
        f'echo "$(date -Is) {STARTED}: job $JOB on $SLURM_JOB_NODELIST"',
    ]
    return lines


def teardown_lines(folder: Path, profile: ClusterProfile) -> list[str]:
    """What the script does when the ranks have ended: it asks whether to requeue, and does."""
    python = python_command(profile)
    if isinstance(profile.container, Pyxis):
        python = shlex.join(["srun", "--nodes=1", "--ntasks=1", *_container_args(profile)]) + f" {python}"
    verdict = f"{python} -m mtl_dist.launch.attempts {shlex.quote(str(folder))}"
    return [
        "code=$?",
        DEAF,
        PROBE,
        f"state=$({JOB_STATE})",
        f'{verdict} --exit-code $code --job-state "$state" && persist scontrol requeue "$JOB"',
        "exit $code",
        "",
    ]


def with_variables(value: str) -> str:
    """A value for `export` in which the shell of the node puts in `$NAME` and `${NAME}`, and nothing else.

    >>> with_variables("$HOME/a b"), with_variables("a b"), with_variables("$(rm x)")
    ('"$HOME"\'/a b\'', "'a b'", "'$(rm x)'")
    """
    parts = re.split(r"(\$\w+|\$\{\w+\})", value)
    quoted = [f'"{part}"' if number % 2 else shlex.quote(part) for number, part in enumerate(parts) if part]
    return "".join(quoted) or "''"


def python_command(profile: ClusterProfile) -> str:
    """The shell command that starts Python on a node."""
    python = profile.python or shlex.quote(sys.executable)
    return f"{profile.container.command} {python}" if isinstance(profile.container, Prefix) else python


def _container_args(profile: ClusterProfile) -> list[str]:
    if not isinstance(profile.container, Pyxis):
        return []
    arguments = [f"--container-image={profile.container.image}"]
    if profile.container.mounts:
        arguments.append(f"--container-mounts={','.join(profile.container.mounts)}")
    return arguments
