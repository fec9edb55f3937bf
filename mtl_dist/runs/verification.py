"""Whether a run's checkpoints are whole, and every number in them finite."""

from __future__ import annotations

from pathlib import Path

from mtl_dist.checkpoint import faults_of, step_directory, steps_in
from mtl_dist.run_folder import RunFolder


def verify(run: Path) -> tuple[list[str], list[str]]:
    """Check every checkpoint of a run: the good ones' names, and one line per problem."""
    folder = RunFolder.open(run)
    good: list[str] = []
    problems: list[str] = []
    for step in steps_in(folder.checkpoints):
        path = step_directory(folder.checkpoints, step)
        found = faults_of(path)
        problems += found
        if not found:
            good.append(path.name)
    return good, problems
