"""`mtl doctor`: is this machine, or this cluster, ready to train?

Here it looks at the machine and starts a few ranks for a moment. With a cluster profile the same ranks are a
short job, and every node speaks for itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtl_dist.errors import UserError
from mtl_dist.printable import printable
from mtl_dist.report.doctor_checks import Check, local_checks

MOST_LOCAL_RANKS = 8
RANKS_TIMEOUT_S = 180.0


def run_doctor(cluster: Path | None = None, *, nodes: int = 2, tasks_per_node: int = 1) -> int:
    """Prints a table of what is well and what is not; 1 if something fails, else 0.

    With a `cluster` profile it looks at that many nodes instead of this machine.

    Raises:
        UserError: a mistake in the profile, no Slurm here, or a job that Slurm refuses.
    """
    console = Console()
    if cluster is None:
        folders = {"runs": Path("runs"), "data": Path("data")}
        findings = [("", check) for check in [*local_checks(folders), *group_checks()]]
    else:
        findings = cluster_checks(cluster, nodes, tasks_per_node, console)
    console.print(table_of(findings))
    levels = [check.level for _, check in findings]
    console.print(f"{levels.count('failure')} failures, {levels.count('warning')} warnings")
    return 1 if "failure" in levels else 0


def table_of(findings: Sequence[tuple[str, Check]]) -> Table:
    """One row per finding, with what to do below what was found.

    A node's name stands before what only this node says.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", overflow="fold", max_width=40)
    table.add_column("found, and what to do", overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    for node, check in findings:
        name = f"{node}: {check.name}" if node else check.name
        text = Text("\n-> ".join(map(printable, filter(None, [check.found, check.advice]))))
        table.add_row(f"[{colours[check.level]}]{check.level}[/]", Text(printable(name)), text)
    return table


def read_findings(folder: Path) -> list[tuple[str, Check]]:
    """What the ranks wrote down; what all nodes say alike stands once, without a name."""
    by_node: dict[str, list[Check]] = {}
    for path in sorted(folder.glob("rank-*.json"), key=lambda path: int(path.stem.removeprefix("rank-"))):
        findings = json.loads(path.read_text(encoding="utf-8"))
        by_node.setdefault(findings["node"], []).extend(Check(**check) for check in findings["checks"])
    first, *others = by_node.values()
    shared = [check for check in first if all(check in checks for checks in others)]
    alone = [(node, check) for node, checks in by_node.items() for check in checks if check not in shared]
    return [("", check) for check in shared] + [(node if others else "", check) for node, check in alone]


# -- this machine -----------------------------------------------------------------------------------------


def group_checks() -> list[Check]:
    """What a few ranks on this machine find out together: one per GPU, or two on CPUs."""
    import torch

    size = min(max(2, torch.cuda.device_count()), MOST_LOCAL_RANKS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = []
        with (folder / "output.txt").open("w+") as output:
            for rank in range(size):
                group: dict[str, object] = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": size,
                    "LOCAL_WORLD_SIZE": size,
                }
                group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
                environment = os.environ | {key: str(value) for key, value in group.items()}
                command = [sys.executable, "-m", "mtl_dist.report.doctor_ranks", str(folder)]
                ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            try:
                _wait_for(ranks)
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
            if any(process.returncode != 0 for process in ranks):
                output.seek(0)
                said = output.read().strip().rsplit("\n", 1)[-1]
                advice = "Look at a firewall on the loopback interface, and at the versions above."
                return [Check("ranks", "failure", f"{size} ranks can't work together: {said}", advice)]
        return [check for _, check in read_findings(folder)]


def _wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits until all have ended, or one has failed, or it takes too long."""
    deadline = time.monotonic() + RANKS_TIMEOUT_S
    while any(process.poll() is None for process in ranks):
        if any(process.returncode for process in ranks) or time.monotonic() > deadline:
            return
        time.sleep(0.1)


# -- a cluster --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoctorJob:
    """What every rank of the doctor's job does."""

    folder: Path

    def __call__(self) -> None:
        from mtl_dist.launch.rank import become_rank

        become_rank(os.environ)
        from mtl_dist.report.doctor_ranks import examine

        examine(self.folder, alone=False)


def cluster_checks(
    profile_path: Path, nodes: int, tasks_per_node: int, console: Console
) -> list[tuple[str, Check]]:
    """Submits a short job, waits for it, and reads what its ranks found."""
    from mtl_dist.launch.script import Shape, build_executor
    from mtl_dist.launch.slurm import (
        load_profile,
        new_submission_folder,
        removed_on_failure,
        require_slurm,
        submit_jobs,
    )
    from mtl_dist.launch.snapshot import take_snapshot
    from mtl_dist.run_folder import new_run_directory

    profile = load_profile(profile_path).model_copy(update={"time_limit": "0:10:00"})
    require_slurm()
    folder, shape = new_run_directory("doctor").resolve(), Shape(nodes, tasks_per_node)
    with removed_on_failure(folder):
        submission = new_submission_folder(folder)
        take_snapshot(submission / "code")
        # Nothing to save and nothing to requeue: the script ends with its ranks.
        executor = build_executor(submission, "mtl-doctor", profile, shape, verdict=False)
        (job_id,) = submit_jobs(executor, [DoctorJob(folder)])
    _await_job(job_id, console)
    if not list(folder.glob("rank-0.json")):
        log = submission / "jobs" / f"{job_id}_0_log.out"
        said = (
            log.read_text(encoding="utf-8", errors="replace").strip().rsplit("\n", 1)[-1]
            if log.exists()
            else ""
        )
        return [("", Check("job", "failure", f"job {job_id} ended early: {said}", f"Read {log}."))]
    return read_findings(folder)


def _await_job(job_id: str, console: Console) -> None:
    """Waits until the job has left the queue; Ctrl-C takes it out."""
    from mtl_dist.launch.squeue import live_jobs

    try:
        with console.status(f"job {job_id}") as line:
            while job := live_jobs().get(job_id):
                line.update(f"job {job_id}: {job.state.lower()} {job.reason} {job.nodes}")
                time.sleep(1.0)
    except KeyboardInterrupt:
        subprocess.run(["scancel", job_id], check=False)
        raise UserError(f"mtl doctor: interrupted; job {job_id} is cancelled.") from None
