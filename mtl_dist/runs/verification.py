"""Whether a run's checkpoints are whole, and every number in them finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mtl_dist.checkpoint import problems_of, step_directory, steps_in
from mtl_dist.config.describe import listed
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.printable import printable
from mtl_dist.run_folder import RunFolder
from mtl_dist.tensor_files import each_tensor


def verify(run: Path) -> tuple[list[str], list[str]]:
    """Check every checkpoint of a run: the good ones' names, and one line per problem."""
    folder = RunFolder.open(run)
    good: list[str] = []
    problems: list[str] = []
    for step in steps_in(folder.checkpoints):
        path = step_directory(folder.checkpoints, step)
        try:
            found = problems_of(path) or not_finite_in(path)
        except UserError as error:  # its hashes are right, and its tensors are none
            found = str(error).splitlines()
        problems += found
        if not found:
            good.append(path.name)
    return good, problems


def not_finite_in(path: Path) -> list[str]:
    """The line about weights, averages and optimizer state with NaN or infinity; none where all are finite.

    What is so on purpose is no damage: NaN in a balancing method's memory (of a task not seen yet), and a
    buffer whose only infinity is the negative one (a mask of attention). What the running epoch's metrics
    have counted is not looked at: a minimum begins at infinity.
    """
    named = sorted(_not_finite(path))
    if not named:
        return []
    return [
        f"{path}: expected finite numbers, found NaN or infinity in {printable(listed(named))}. "
        "Go on from an older checkpoint: remove this one."
    ]


def _not_finite(path: Path) -> Iterator[str]:
    """The names of these tensors, as `model/NAME`."""
    learnt: set[str] = set()
    for file in ("optimizer", "model", "ema"):
        if not (path / f"{file}.safetensors").is_file():
            continue
        for name, tensor in each_tensor(path / f"{file}.safetensors"):
            if file == "optimizer":
                learnt.add(name.partition("/")[2])
            if not (tensor.is_floating_point() or tensor.is_complex()) or torch.isfinite(tensor).all():
                continue
            is_memory = name.startswith("balancer.") and not name.startswith("balancer.scales.")
            is_mask = name not in learnt and torch.isfinite(tensor).logical_or(tensor == -torch.inf).all()
            if file == "optimizer" or not (is_memory or is_mask):
                yield f"{file}/{name}"
