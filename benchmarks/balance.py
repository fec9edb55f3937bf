"""What balancing costs: the time of a training step in parts of that with equal weights, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/balance.py [--backbone resnet18] [--tasks 3] [--masks 0]
        [--image-size 64] [--batch 8] [--repeats 5]

All methods take turns, step by step, so that a busy machine slows all alike; a ratio is the median over the
turns. On a CPU the time is the processor's, on a GPU the clock's. Memory is that of a process (or GPU) of its
own which runs one method. `torchjd`, where it is installed, is its own documented step (mtl_backward, then
jac_to_grad) on the same model, losses and optimizer, its tasks differentiated one by one or all at once,
whichever is faster.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import TypeAdapter

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
    "rlw": {"method": "rlw"},
    "gls": {"method": "gls"},
    "stch": {"method": "stch"},
    "famo": {"method": "famo"},
    "mgda, features": {"method": "mgda", "level": "features"},
    "cagrad, features": {"method": "cagrad", "level": "features"},
    "nash, features": {"method": "nash", "level": "features"},
    "upgrad, features": {"method": "upgrad", "level": "features"},
    "pcgrad, parameters": {"method": "pcgrad", "level": "parameters"},
    "upgrad, parameters": {"method": "upgrad", "level": "parameters"},
    "upgrad, parameters, every 10": {"method": "upgrad", "level": "parameters", "every": 10},
    "graddrop": {"method": "graddrop"},
}
TORCHJD = {"torchjd pcgrad, one by one": 1, "torchjd pcgrad, all at once": None}


@dataclass(frozen=True)
class Scene:
    """What is trained."""

    backbone: str
    num_tasks: int
    num_masks: int
    image_size: int
    batch: int
    device: str


class Trainee:
    """A model, a batch and an optimizer; `step()` is one training step with one method."""

    def __init__(self, scene: Scene, balance: dict[str, Any]) -> None:
        torch.manual_seed(0)
        device = torch.device(scene.device)
        kinds: dict[str, TaskKind] = {
            f"task{t}": "segmentation" if t < scene.num_masks else "classification"
            for t in range(scene.num_tasks)
        }
        classes = tuple(str(c) for c in range(NUM_CLASSES))
        infos = {
            name: TaskInfo(kind, classes=classes, num_labelled=100, class_counts=(10,) * NUM_CLASSES)
            for name, kind in kinds.items()
        }
        settings: dict[str, TaskSettings] = {
            name: SegmentationSettings() if kind == "segmentation" else ClassificationSettings()
            for name, kind in kinds.items()
        }
        tasks = build_tasks(settings, infos)
        size = (scene.image_size, scene.image_size)
        heads = [task.head for task in tasks.values()]
        model = build_model(ModelSettings(backbone=scene.backbone), heads, 3, size)
        adapter: TypeAdapter[BalanceSettings] = TypeAdapter(BalanceSettings)
        balancer = build_balancer(
            adapter.validate_python(balance), list(tasks), kinds, dict.fromkeys(tasks, 1.0)
        )
        world = World(rank=0, size=1, local_rank=0, device=device)
        self.root = RootModule(model, tasks, balancer, world, "fp32", 0).to(device)
        self.root = self.root.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.root.parameters(), lr=1e-3, momentum=0.9)
        self.batch = _batch(scene, kinds).to(device)
        self.counts_T = count_labels(tasks, [self.batch])
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

        model, batch = self.root.model, self.batch
        features = model.features(batch.images_BCHW)
        outputs = model.heads_forward(features, (batch.images_BCHW.shape[2], batch.images_BCHW.shape[3]))
        losses = [
            task.loss_sum(outputs[name], batch.targets[name], batch.labelled[name]) / count
            for (name, task), count in zip(self.root.tasks.items(), self.counts_T.tolist(), strict=True)
        ]
        mtl_backward(losses, features=list(features.values()), parallel_chunk_size=chunk)
        jac_to_grad(self.root.shared, PCGrad())
        self._update()

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


def steps_of(scene: Scene, name: str) -> tuple[Callable[[], None], int]:
    """One turn of a method, and how many steps it is: a whole period of those that solve now and then."""
    if name in TORCHJD:
        trainee = Trainee(scene, METHODS["equal"])
        return lambda: trainee.step_of_torchjd(TORCHJD[name]), 1
    return Trainee(scene, METHODS[name]).step, METHODS[name].get("every", 1)


def clock(device: str) -> float:
    """Seconds: of the processor, or of the wall once the GPU has done all."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(scene: Scene, name: str) -> int:
    """Bytes, in a process that has run nothing else."""
    step, num_steps = steps_of(scene, name)
    for _ in range(num_steps + 1):
        step()
    if scene.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--masks", type=int, default=0, help="tasks of these that have a U-Net head")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scene = Scene(options.backbone, options.tasks, options.masks, options.image_size, options.batch, device)
    names = [*METHODS, *(TORCHJD if find_spec("torchjd") else [])]

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(peak_memory, (scene, name)) for name in names}

    turns = {name: steps_of(scene, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.repeats + 1):
        for name, (step, num_steps) in turns.items():
            start = clock(device)
            for _ in range(num_steps):
                step()
            if number:  # the first turn warms up
                times[name].append((clock(device) - start) / num_steps)

    print(
        f"{options.backbone}, {options.tasks} tasks ({options.masks} with a U-Net head), "
        f"{options.batch} images of {options.image_size} x {options.image_size}, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'method':30} {'ms/step':>8} {'ratio':>6} {'least':>6} {'most':>6} {'peak MiB':>9} {'more':>6}")
    for name in names:
        ratios = [ours / equal for ours, equal in zip(times[name], times["equal"], strict=True)]
        mebi = memory[name] / 2**20
        print(
            f"{name:30} {statistics.median(times[name]) * 1e3:8.1f} {statistics.median(ratios):6.2f} "
            f"{min(ratios):6.2f} {max(ratios):6.2f} {mebi:9.0f} {mebi - memory['equal'] / 2**20:6.0f}"
        )


if __name__ == "__main__":
    main()
