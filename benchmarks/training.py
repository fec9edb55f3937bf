"""What the training benchmarks train: three tasks on one backbone, by the package's own trainer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from mtl_dist.balance.fixed import FixedSettings
from mtl_dist.balance.methods import build_balancer
from mtl_dist.batch import Batch
from mtl_dist.checkpoint import CheckpointWriter
from mtl_dist.engine.connect import Connection
from mtl_dist.engine.precision import Precision
from mtl_dist.models.compiling import compile_parts
from mtl_dist.models.multitask import build_model
from mtl_dist.models.settings import Checkpointing, ModelSettings
from mtl_dist.monitor import Monitor, MonitorSettings
from mtl_dist.optim import ConstantSchedule, OptimSettings, build_optimizer
from mtl_dist.specs import TaskInfo, TaskKind
from mtl_dist.step import RootModule
from mtl_dist.stopping import StopSignal
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tracking import Tracker
from mtl_dist.trainer import Plan, Trainer

TASKS = {"object": 10, "colour": 5, "place": 3}
"""Classification tasks and their numbers of classes."""

OPTIM = OptimSettings(schedule=ConstantSchedule())
_ENDLESS = 10**12


@dataclass(frozen=True)
class Scene:
    """One training: `batch` images of `image_size` squared per rank and step."""

    backbone: str = "resnet18"
    batch: int = 16
    image_size: int = 64
    precision: Precision = "fp32"
    checkpointing: Checkpointing = "off"
    channels_last: bool = True
    compiled: bool = False


def random_batch(scene: Scene, device: torch.device) -> Batch:
    """Noise, labelled for every task."""
    everywhere = torch.ones(scene.batch, dtype=torch.bool)
    size = (scene.batch, 3, scene.image_size, scene.image_size)
    images_BCHW = torch.randint(0, 256, size, dtype=torch.uint8)
    batch = Batch(
        images_BCHW=images_BCHW.contiguous(memory_format=torch.channels_last),
        targets={name: torch.randint(0, number, (scene.batch,)) for name, number in TASKS.items()},
        labelled=dict.fromkeys(TASKS, everywhere),
        valid_B=everywhere,
        positions_B=torch.arange(scene.batch),
        keys=[""] * scene.batch,
    )
    return batch.to(device)


def build_trainer(
    scene: Scene,
    connection: Connection,
    writer: CheckpointWriter | None = None,
    checkpoint_every: int | None = None,
) -> Trainer:
    """The trainer as a run has it, without a run folder."""
    world = connection.world
    torch.manual_seed(0)
    kinds: dict[str, TaskKind] = dict.fromkeys(TASKS, "classification")
    infos = {
        name: TaskInfo(
            "classification",
            classes=tuple(map(str, range(number))),
            num_labelled=number,
            class_counts=(1,) * number,
        )
        for name, number in TASKS.items()
    }
    tasks = build_tasks(dict.fromkeys(TASKS, ClassificationSettings()), infos)
    size = (scene.image_size, scene.image_size)
    settings = ModelSettings(backbone=scene.backbone, checkpointing=scene.checkpointing)
    model = build_model(settings, [task.head for task in tasks.values()], 3, size)
    model.lie_in(torch.channels_last if scene.channels_last else torch.contiguous_format)
    balancer = build_balancer(FixedSettings(), list(tasks), kinds, dict.fromkeys(tasks, 1.0))
    root = RootModule(model, tasks, balancer, world, scene.precision, seed=0)
    if scene.compiled:
        compile_parts(model, world.device, recomputing=scene.checkpointing != "off")
    optimizer = build_optimizer(OPTIM, model, list(tasks), [])
    engine = connection.build(root, optimizer, [root.task_parameters(name) for name in tasks])
    root.served_by(engine)
    plan = Plan(
        samples_per_epoch=_ENDLESS,
        end_position=_ENDLESS,
        global_batch=scene.batch * world.size,
        accumulation=1,
        seed=0,
        evaluate_every=1,
        checkpoint_every=checkpoint_every,
        log_every=10,
    )
    return Trainer(
        engine=engine,
        root=root,
        optim=OPTIM,
        plan=plan,
        monitor=Monitor(MonitorSettings(), "min", ConstantSchedule()),
        ema=None,
        evaluate=None,
        writer=writer,
        tracker=Tracker(None, 0),
        stop=StopSignal(),
        recipe_text="",
    )


class Laps:
    """The clock of one call of `Trainer.run` over `steps + 1` batches; the trainer calls it after each step.

    The first step does not count: it begins before the loop does.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device = device
        self._steps = steps
        self._count = 0
        self._start = self._end = 0.0

    def __call__(self, samples: int) -> None:
        if self._count == 0:
            self._start = effort(self._device)
        elif self._count == self._steps:
            self._end = effort(self._device)
        self._count += 1

    @property
    def seconds_per_step(self) -> float:
        return (self._end - self._start) / self._steps


def effort(device: torch.device) -> float:
    """Seconds of this process's processor; on a GPU those of the clock, once it has done all."""
    return clock(device) if device.type == "cuda" else time.process_time()


def clock(device: torch.device) -> float:
    """Seconds; on a GPU once it has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def first(batches: Iterable[Batch], number: int) -> Iterator[Batch]:
    """So many batches, and no more fetched than these."""
    source = iter(batches)
    for _ in range(number):
        yield next(source)
