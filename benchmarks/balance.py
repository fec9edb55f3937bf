"""What balancing costs: the time of a step in parts of that with equal weights, peak memory, solvers.

All methods train the same model on the same batch, taking turns, so that a busy machine slows all alike; a
ratio is the median over the turns. On a CPU the time is the processor's, on a GPU the clock's. Memory is that
of a process (or GPU) of its own which runs one method.

Beside ours stand the steps of others, where they are installed, on the same model, losses and optimizer:
torchjd as its documentation has it (mtl_backward, then jac_to_grad), its tasks differentiated one by one or
all at once; LibMTL's PCGrad as its trainer calls it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks
from mtl_dist.balance.gradient import GradientBalancer, GradientSettings, Problem
from mtl_dist.balance.methods import METHODS as METHOD_CLASSES
from mtl_dist.balance.methods import BalanceSettings, build_balancer
from mtl_dist.batch import Batch
from mtl_dist.engine.world import World
from mtl_dist.models.multitask import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import TaskInfo, TaskKind
from mtl_dist.step import RootModule, WindowTotals, count_labels
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.registry import TaskSettings, build_tasks
from mtl_dist.tasks.segmentation import SegmentationSettings

NUM_CLASSES = 10
METHODS: dict[str, dict[str, Any]] = {
    "equal": {"method": "equal"},
    "uncertainty": {"method": "uncertainty"},
    "dwa": {"method": "dwa"},
    "stch": {"method": "stch"},
    "famo": {"method": "famo"},
    "cagrad, features": {"method": "cagrad", "level": "features"},
    "upgrad, features": {"method": "upgrad", "level": "features"},
    "pcgrad, parameters": {"method": "pcgrad", "level": "parameters"},
    "pcgrad, parameters, every 10": {"method": "pcgrad", "level": "parameters", "every": 10},
    "graddrop": {"method": "graddrop"},
}
TORCHJD = {"torchjd pcgrad, one by one": 1, "torchjd pcgrad, all at once": None}
LIBMTL = "LibMTL pcgrad"
EQUAL = "equal"
SOLVED_TASKS = (2, 10, 40)
LOSSES_LIMIT, FEATURES_LIMIT, PARAMETERS_LIMIT, EVERY_10_LIMIT = 1.03, 1.25, 0.75, 1.3
"""What a step may cost in parts of one with equal weights; PARAMETERS_LIMIT more per task."""


@dataclass(frozen=True)
class Scene:
    """What is trained."""

    backbone: str
    num_tasks: int
    num_masks: int
    image_size: int
    batch: int
    device: str


class Material:
    """What all methods of a scene share: model, tasks, batch and optimizer."""

    def __init__(self, scene: Scene, memory_format: torch.memory_format = torch.channels_last) -> None:
        self.scene = scene
        torch.manual_seed(0)
        device = torch.device(scene.device)
        self.kinds: dict[str, TaskKind] = {
            f"task{t}": "segmentation" if t < scene.num_masks else "classification"
            for t in range(scene.num_tasks)
        }
        classes = tuple(str(c) for c in range(NUM_CLASSES))
        infos = {
            name: TaskInfo(kind, classes=classes, num_labelled=100, class_counts=(10,) * NUM_CLASSES)
            for name, kind in self.kinds.items()
        }
        settings: dict[str, TaskSettings] = {
            name: SegmentationSettings() if kind == "segmentation" else ClassificationSettings()
            for name, kind in self.kinds.items()
        }
        self.tasks = build_tasks(settings, infos)
        size = (scene.image_size, scene.image_size)
        heads = [task.head for task in self.tasks.values()]
        model = build_model(ModelSettings(backbone=scene.backbone), heads, 3, size)
        self.model = model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        self.world = World(rank=0, size=1, local_rank=0, device=device)
        self.batch = _batch(scene, self.kinds).to(device)
        self.counts_T = count_labels(self.tasks, [self.batch])


class Trainee:
    """A model, a batch and an optimizer; `step()` is one training step with one method."""

    def __init__(self, material: Material, balance: dict[str, Any]) -> None:
        adapter: TypeAdapter[BalanceSettings] = TypeAdapter(BalanceSettings)
        settings = adapter.validate_python(balance)
        names, ones = list(material.tasks), dict.fromkeys(material.tasks, 1.0)
        balancer = build_balancer(settings, names, material.kinds, ones)
        self.root = RootModule(material.model, material.tasks, balancer, material.world, "fp32", 0)
        self.root.to(material.world.device)
        self.optimizer = torch.optim.SGD(self.root.parameters(), lr=1e-3, momentum=0.9)
        self.batch, self.counts_T = material.batch, material.counts_T
        self.number = 0

    def step(self) -> None:
        """As the trainer does it."""
        totals = WindowTotals(self.counts_T, 1, self.number)
        self.root(self.batch, totals).backward()
        self.root.observe(self.root.local_sums_T, totals)
        self._update()

    def step_of_torchjd(self, chunk: int | None) -> None:
        """As its documentation has it for multi-task learning."""
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        features = self.root.model.features(self.batch.images_BCHW)
        losses = self._losses(features)
        mtl_backward(losses, features=list(features.values()), parallel_chunk_size=chunk)
        jac_to_grad(self.root.shared, PCGrad())
        self._update()

    def step_of_libmtl(self, weighting: Any) -> None:
        """As its trainer has it: forward, `backward` of its weighting, optimizer."""
        losses = self._losses(self.root.model.features(self.batch.images_BCHW))
        weighting.backward(torch.stack(losses))
        self._update()

    def _losses(self, features: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        batch = self.batch
        size = (batch.images_BCHW.shape[2], batch.images_BCHW.shape[3])
        outputs = self.root.model.heads_forward(features, size)
        return [
            task.loss_sum(outputs[name], batch.targets[name], batch.labelled[name]) / count
            for (name, task), count in zip(self.root.tasks.items(), self.counts_T.tolist(), strict=True)
        ]

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1


def _batch(scene: Scene, kinds: dict[str, TaskKind]) -> Batch:
    num, size = scene.batch, scene.image_size
    targets = {
        name: torch.randint(0, NUM_CLASSES, (num, size, size), dtype=torch.uint8)
        if kind == "segmentation"
        else torch.randint(0, NUM_CLASSES, (num,))
        for name, kind in kinds.items()
    }
    everywhere = torch.ones(num, dtype=torch.bool)
    return Batch(
        images_BCHW=torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8),
        targets=targets,
        labelled=dict.fromkeys(kinds, everywhere),
        valid_B=everywhere,
        positions_B=torch.arange(num),
        keys=[str(number) for number in range(num)],
    )


def steps_of(material: Material, name: str) -> tuple[Callable[[], None], int]:
    """One turn of a method, and how many steps it is: a whole period of those that solve now and then."""
    if name in TORCHJD:
        trainee = Trainee(material, METHODS[EQUAL])
        return lambda: trainee.step_of_torchjd(TORCHJD[name]), 1
    if name == LIBMTL:
        # It takes views of gradients, which it can in this memory format alone.
        trainee = Trainee(Material(material.scene, torch.contiguous_format), METHODS[EQUAL])
        weighting = _libmtl_pcgrad(trainee)
        return lambda: trainee.step_of_libmtl(weighting), 1
    return Trainee(material, METHODS[name]).step, METHODS[name].get("every", 1)


def _libmtl_pcgrad(trainee: Trainee) -> Any:
    """LibMTL's PCGrad with what its trainer would give it."""
    # LibMTL 1.1.5 imports a module that torchvision has since removed.
    substitute = types.ModuleType("torchvision.models.utils")
    substitute.load_state_dict_from_url = torch.hub.load_state_dict_from_url  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision.models.utils", substitute)
    pcgrad: Any = import_module("LibMTL.weighting.PCGrad")

    shared = trainee.root.shared
    weighting = pcgrad.PCGrad()
    weighting.rep_grad, weighting.task_num = False, len(trainee.root.tasks)
    weighting.device = trainee.batch.images_BCHW.device
    weighting.get_share_params = lambda: shared

    def zero_grad() -> None:
        for parameter in shared:
            # Its trainer's zero_grad(set_to_none=False): `_reset_grad` writes into what is there.
            if parameter.grad is not None:
                parameter.grad.zero_()

    weighting.zero_grad_share_params = zero_grad
    return weighting


def clock(device: str) -> float:
    """Seconds: of the processor, or of the wall once the GPU has done all."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(scene: Scene, name: str) -> int:
    """Bytes, in a process that has run nothing else."""
    step, _ = steps_of(Material(scene), name)
    step()
    if scene.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_balance(scenes: Sequence[Scene], repeats: int) -> None:
    """Measure every scene, then the solvers, and print a table of each."""
    console = Console()
    where = f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {repeats}"
    console.print(f"{scenes[0].device}, {where}; load {os.getloadavg()[0]:.1f}", highlight=False)
    names = [*METHODS, *(TORCHJD if find_spec("torchjd") else []), *([LIBMTL] if find_spec("LibMTL") else [])]
    # Before this process computes anything: a fork of one that has would hold its memory too.
    memory = {scene: {name: _apart(peak_memory, scene, name) for name in names} for scene in scenes}
    for scene in scenes:
        console.print(_table(scene, memory[scene], _times(scene, names, repeats)))
    console.print(_solver_table(repeats))


def _apart(measure: Callable[[Scene, str], int], scene: Scene, name: str) -> int:
    """What `measure` returns, in a process of its own."""
    context = multiprocessing.get_context("fork" if scene.device == "cpu" else "spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (scene, name))


def _times(scene: Scene, names: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each method, one for each turn."""
    material = Material(scene)
    turns = {name: steps_of(material, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats + 1):
        for name, (step, num_steps) in turns.items():
            start = clock(scene.device)
            for _ in range(num_steps):
                step()
            if number:  # The first turn warms up.
                times[name].append((clock(scene.device) - start) / num_steps)
    return times


def _table(scene: Scene, memory: Mapping[str, int], times: Mapping[str, Sequence[float]]) -> Table:
    pictures = f"{scene.batch} images of {scene.image_size} x {scene.image_size}"
    masks = f" ({scene.num_masks} with a U-Net head)" if scene.num_masks else ""
    table = Table(title=f"{scene.backbone}, {scene.num_tasks} tasks{masks}, {pictures}")
    table.add_column("method")
    for column in ("ms/step", "ratio", "limit", "least", "most", "peak MiB", "more"):
        table.add_column(column, justify="right")
    for name, own in times.items():
        ratios = [ours / equal for ours, equal in zip(own, times[EQUAL], strict=True)]
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        mebi = memory[name] / 2**20
        table.add_row(
            name,
            f"{statistics.median(own) * 1e3:.1f}",
            f"{figures[0]:.2f}",
            _limit(name, scene),
            *(f"{figure:.2f}" for figure in figures[1:]),
            f"{mebi:.0f}",
            f"{mebi - memory[EQUAL] / 2**20:.0f}",
        )
    return table


def _limit(name: str, scene: Scene) -> str:
    """The ratio that is promised; none for the steps of others, graddrop, and features of U-Net heads."""
    balance = METHODS.get(name, {})
    if balance.get("every") == 10:
        return f"{EVERY_10_LIMIT:.2f}"
    if balance.get("level") == "parameters":
        return f"{1 + PARAMETERS_LIMIT * scene.num_tasks:.2f}"
    if balance.get("level") == "features":
        return "" if scene.num_masks else f"{FEATURES_LIMIT:.2f}"
    return f"{LOSSES_LIMIT:.2f}" if name in METHODS and name not in (EQUAL, "graddrop") else ""


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


def solve_times(method: type[GradientSettings], num_tasks: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one solve by kind of Gramian; the median."""
    names = [f"task{t}" for t in range(num_tasks)]
    kinds: list[TaskKind] = ["classification"] * num_tasks
    facts = BalancedTasks(tuple(names), tuple(kinds), (1.0,) * num_tasks)
    balancer = METHOD_CLASSES[method](method(), facts)
    assert isinstance(balancer, GradientBalancer)
    losses_T, present_T = torch.ones(num_tasks, dtype=torch.float64), torch.ones(num_tasks, dtype=torch.bool)
    found = {}
    for kind, gramian_TT in gramians(num_tasks).items():
        problem = Problem(gramian_TT, losses_T, present_T, (0, 0))
        times = []
        for _ in range(repeats + 1):
            start = time.process_time()
            balancer.solve(problem)
            times.append(time.process_time() - start)
        found[kind] = statistics.median(times[1:]) * 1e3
    return found


def _solver_table(repeats: int) -> Table:
    table = Table(title="one solve, ms: independent gradients, and the slowest of all kinds")
    table.add_column("method")
    for num_tasks in SOLVED_TASKS:
        table.add_column(f"{num_tasks} tasks", justify="right")
        table.add_column("slowest", justify="right")
        table.add_column("kind")
    for method in METHOD_CLASSES:
        if issubclass(method, GradientSettings):
            cells = []
            for num_tasks in SOLVED_TASKS:
                times = solve_times(method, num_tasks, repeats)
                slowest = max(times, key=lambda kind: times[kind])
                cells += [f"{times['independent']:.2f}", f"{times[slowest]:.2f}", slowest]
            table.add_row(str(method.model_fields["method"].default), *cells)
    return table
