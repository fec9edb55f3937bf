"""What several ranks find out together: bandwidth, clocks, and whether their gradients are right.

    python -m mtl_dist.report.doctor_ranks FOLDER

runs in every rank of the group that the environment describes, and leaves `rank-<k>.json` in the folder.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.durable import write_text
from mtl_dist.report.doctor_checks import Check, local_checks

BANDWIDTH_ELEMENTS = 4 << 20
ROUNDS = 5
BATCH = 16


def examine(folder: Path, *, alone: bool) -> None:
    """Joins the group, and writes down what this rank found.

    `alone` leaves out the checks of this machine: somebody else does them.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    checks = []
    if not alone and local_rank == 0:
        checks += local_checks({"runs": folder, "working directory": Path.cwd()})
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=size)
    group = [clock_skew(device), bandwidth(device), gradient_parity(device)]
    dist.destroy_process_group()
    if rank == 0:
        checks += group
    findings = {
        "node": os.environ.get("SLURMD_NODENAME", platform.node()),
        "checks": [asdict(check) for check in checks],
    }
    write_text(folder / f"rank-{rank}.json", json.dumps(findings), sync=False)


def clock_skew(device: torch.device) -> Check:
    """The largest difference between the ranks' clocks, read after a barrier."""
    dist.all_reduce(torch.zeros(1, device=device))
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    first, last = now.clone(), now.clone()
    dist.all_reduce(first, dist.ReduceOp.MIN)
    dist.all_reduce(last, dist.ReduceOp.MAX)
    skew = float(last - first)
    found = f"{skew * 1000:.0f} ms apart over {dist.get_world_size()} ranks"
    if skew > 1.0:
        return Check("clocks", "warning", found, "Synchronise the nodes' clocks (chrony): logs will mislead.")
    return Check("clocks", "ok", found)


def bandwidth(device: torch.device) -> Check:
    """The bus bandwidth of an all-reduce of 16 MiB: 2 (n - 1) / n times the bytes, over the time."""
    values = torch.ones(BANDWIDTH_ELEMENTS, device=device)
    dist.all_reduce(values)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    _synchronize(device)
    seconds = (time.perf_counter() - start) / ROUNDS
    size, backend = dist.get_world_size(), dist.get_backend()
    speed = 2 * (size - 1) / size * values.nbytes / seconds / 1e9
    found = f"{speed:.2f} GB/s between {size} ranks over {backend}"
    if speed < (1.0 if backend == "nccl" else 0.05):
        advice = (
            "Name the fast network in the profile (network_interface); NCCL_DEBUG=INFO says what is used."
        )
        return Check("all-reduce", "warning", found, advice)
    return Check("all-reduce", "ok", found)


def gradient_parity(device: torch.device) -> Check:
    """Whether the ranks' averaged gradients are those of one process with the whole batch."""
    size, rank = dist.get_world_size(), dist.get_rank()
    images = torch.rand(BATCH * size, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)

    def gradients(inputs: torch.Tensor, together: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4)).to(
            device
        )
        wrapped = nn.parallel.DistributedDataParallel(model) if together else model
        wrapped(inputs).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with torch.backends.cudnn.flags(allow_tf32=False):
        together = gradients(images[rank * BATCH : (rank + 1) * BATCH], together=True)
        single = gradients(images, together=False)
    worst = ((together - single).abs().max() / single.abs().max()).reshape(1)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    found = f"{size} ranks differ from one process by {float(worst):.1e}"
    if not float(worst) < 1e-4:
        return Check(
            "gradients", "failure", found, "Do not train here: the ranks do not sum what they should."
        )
    return Check("gradients", "ok", found)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    examine(Path(sys.argv[1]), alone=True)
