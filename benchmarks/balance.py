"""What balancing costs: the time of a step in parts of that with equal weights, peak memory, solvers.

All methods train the same model on the same batch, taking turns; beside ours stand the steps of torchjd and
LibMTL, where they are installed. Memory is that of a process of its own which runs one method.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.contenders import METHODS, balanced, balancing_contenders, period
from benchmarks.measuring import Gauge, in_turns, memory_is_measured, ratios
from benchmarks.memory import Case, peaks
from benchmarks.tables import Findings, Row
from benchmarks.training import Scene
from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.method import BalancedTasks
from mtl_dist.balance.methods import METHODS as METHOD_CLASSES
from mtl_dist.engine.connect import Connection, connect
from mtl_dist.engine.settings import EngineSettings

SOLVED_TASKS = (2, 10, 40)
LOSSES_LIMIT, FEATURES_LIMIT, PARAMETERS_LIMIT, EVERY_10_LIMIT = 1.03, 1.25, 0.75, 1.3
"""What a step may cost in parts of one with equal weights; PARAMETERS_LIMIT more per task."""
_MEBI = 2**20


def bench_balance(scenes: Sequence[Scene], repeats: int) -> None:
    """Measure every scene, then the solvers, and print a table of each."""
    connection = connect(EngineSettings(), "fp32")
    console = Console(width=120)
    where = f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {repeats}"
    console.print(f"{connection.world.device}, {where}; load {os.getloadavg()[0]:.1f}", highlight=False)
    for scene in scenes:
        measure_balance(scene, connection, balancing_contenders(), repeats).show(console)
    measure_solvers(repeats).show(console)


def measure_balance(scene: Scene, connection: Connection, names: Sequence[str], repeats: int) -> Findings:
    """A row for each of `names`, the first of which is `equal`: what the others are compared with."""
    with_memory = memory_is_measured()
    memory = {name: peak_memory(scene, connection, name) for name in names if with_memory}
    contenders = {name: balanced(scene, connection, name) for name in names}
    steps = {name: period(name) for name in names}
    seconds = in_turns(contenders, steps, repeats, connection.world.device)
    rows: list[Row] = []
    for name, own in seconds.items():
        found = ratios(own, seconds["equal"])
        rows.append(
            {
                "method": name,
                "ms/step": statistics.median(own) * 1e3,
                "ratio": statistics.median(found),
                "limit": limit(name, scene),
                "least": min(found),
                "most": max(found),
                "peak MiB": memory[name] / _MEBI if with_memory else None,
                "more": (memory[name] - memory["equal"]) / _MEBI if with_memory else None,
            }
        )
    return Findings(f"balancing of {scene.describe()}", rows)


def peak_memory(scene: Scene, connection: Connection, name: str) -> int:
    """Bytes; on a GPU, whose allocator counts tensors, here, and on a CPU in a process of its own."""
    device = connection.world.device
    if device.type != "cuda":
        return max(peaks(Case(scene, contender=name)).training)
    gc.collect()
    gauge = Gauge(device)
    balanced(scene, connection, name)(3, gauge)
    return gauge.noted


def limit(name: str, scene: Scene) -> float | None:
    """The ratio that is promised; none for external steps, graddrop, and features of U-Net heads."""
    balance = METHODS.get(name, {})
    if balance.get("every") == 10:
        return EVERY_10_LIMIT
    if balance.get("level") == "parameters":
        return 1 + PARAMETERS_LIMIT * scene.num_tasks
    if balance.get("level") == "features":
        return None if scene.num_masks else FEATURES_LIMIT
    return LOSSES_LIMIT if name in METHODS and name not in ("equal", "graddrop") else None


# ---------------------------------------------------------------- solvers
def gramians(num_tasks: int) -> dict[str, Tensor]:
    """Gramians that come up, in float32's precision: independent gradients, and all kinds of dependence."""
    generator = torch.Generator().manual_seed(num_tasks)

    def normal(columns: int) -> Tensor:
        return torch.randn(num_tasks, columns, generator=generator, dtype=torch.float64)

    free, half = normal(1000), num_tasks // 2
    duplicated, opposite = free.clone(), free.clone()
    duplicated[half:] = free[: num_tasks - half]
    opposite[half:] = -free[: num_tasks - half]
    repeated = free[torch.randint(max(1, num_tasks // 4), (num_tasks,), generator=generator)]
    signs = torch.randint(2, (num_tasks, 1), generator=generator) * 2 - 1
    ranks = sorted({max(1, round(num_tasks * part / 8)) for part in range(1, 8)})
    rows = {
        "independent": free,
        "in conflict": free - 1.05 * free.mean(dim=0),
        "nearly parallel": free[:1] + 0.1 * normal(1000),
        "lengths 1e-4 to 1e4": free * torch.logspace(-4, 4, num_tasks, dtype=torch.float64)[:, None],
        "duplicated": duplicated,
        "opposite": opposite,
        "a few, with any sign": repeated * signs,
        **{f"of rank {rank}": normal(rank) for rank in ranks},
    }
    return {name: (rows_TP @ rows_TP.T).float().double() for name, rows_TP in rows.items()}


def solve_times(method: type[GradientMethod], num_tasks: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one solve by kind of Gramian; the median."""
    names = [f"task{t}" for t in range(num_tasks)]
    facts = BalancedTasks(tuple(names), (1.0,) * num_tasks, (1.0,) * num_tasks)
    solver = method(method=method.model_fields["method"].default)
    losses_T, present_T = torch.ones(num_tasks, dtype=torch.float64), torch.ones(num_tasks, dtype=torch.bool)
    found = {}
    for kind, gramian_TT in gramians(num_tasks).items():
        problem = Problem(gramian_TT, losses_T, present_T, (0, 0), solver.memory(facts))
        times = []
        for _ in range(repeats + 1):
            start = time.process_time()
            solver.solve(problem)
            times.append(time.process_time() - start)
        found[kind] = statistics.median(times[1:]) * 1e3
    return found


def measure_solvers(repeats: int) -> Findings:
    """One solve of every method that compares gradients."""
    rows: list[Row] = []
    for method in METHOD_CLASSES:
        if issubclass(method, GradientMethod):
            row: dict[str, str | float | None] = {"method": str(method.model_fields["method"].default)}
            for num_tasks in SOLVED_TASKS:
                times = solve_times(method, num_tasks, repeats)
                slowest = max(times, key=lambda kind: times[kind])
                row[f"{num_tasks} tasks"] = times["independent"]
                row[f"{num_tasks} tasks, slowest"] = times[slowest]
                row[f"of {num_tasks}: kind"] = slowest
            rows.append(row)
    return Findings("one solve, ms: independent gradients, and the slowest of all kinds", rows)
