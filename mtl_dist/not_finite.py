"""NaN and infinity in a checkpoint: its hashes may be right, and it is no good all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mtl_dist.config.describe import listed
from mtl_dist.printable import printable
from mtl_dist.tensor_files import each_tensor


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
