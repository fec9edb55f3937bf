"""What the training benchmarks train: some tasks on one backbone, by the package's own trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from mtl_dist.balance.methods import BalanceSettings, build_balancer
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.checkpoint import CheckpointWriter
from mtl_dist.engine.connect import Connection
from mtl_dist.engine.settings import Precision
from mtl_dist.figures.run_figures import RunFigures
from mtl_dist.models.building import build_model
from mtl_dist.models.compiling import compile_parts
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import Checkpointing, ModelSettings
from mtl_dist.monitor import Monitor, MonitorSettings
from mtl_dist.optim import ConstantSchedule, OptimSettings, build_optimizer
from mtl_dist.specs import TaskInfo
from mtl_dist.step import RootModule
from mtl_dist.stopping import StopSignal
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.registry import TaskSettings, build_tasks
from mtl_dist.tasks.segmentation import SegmentationSettings
from mtl_dist.tasks.task import Task
from mtl_dist.tracking.tracker import Tracker
from mtl_dist.training.plan import Plan
from mtl_dist.training.trainer import Trainer

NUM_CLASSES = 10
EQUAL: Mapping[str, Any] = {"method": "equal"}
_ENDLESS = 10**12


@dataclass(frozen=True)
class Scene:
    """One training: `batch` images of `image_size` squared per rank and step.

    The first `num_masks` of the `num_tasks` tasks are segmentations with a U-Net head, the others
    classifications.
    """

    backbone: str = "resnet18"
    batch: int = 16
    image_size: int = 64
    precision: Precision = "fp32"
    num_tasks: int = 3
    num_masks: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    checkpointing: Checkpointing = "off"
    channels_last: bool = True
    compiled: bool = False

    @property
    def kinds(self) -> dict[str, str]:
        return {
            f"task{t}": "segmentation" if t < self.num_masks else "classification"
            for t in range(self.num_tasks)
        }

    @property
    def optim(self) -> OptimSettings:
        return OptimSettings(kind=self.optimizer, schedule=ConstantSchedule())

    def describe(self) -> str:
        """For a table's title."""
        masks = f" ({self.num_masks} with a U-Net head)" if self.num_masks else ""
        images = f"{self.batch} images of {self.image_size} x {self.image_size}"
        return f"{self.backbone}, {self.precision}, {self.num_tasks} tasks{masks}, {images}"


def random_batch(scene: Scene, device: torch.device) -> Batch:
    """Noise, labelled for every task."""
    num, size = scene.batch, scene.image_size
    targets = {
        name: torch.randint(0, NUM_CLASSES, (num, size, size), dtype=torch.uint8)
        if kind == "segmentation"
        else torch.randint(0, NUM_CLASSES, (num,))
        for name, kind in scene.kinds.items()
    }
    everywhere = torch.ones(num, dtype=torch.bool)
    images_BCHW = torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8)
    batch = Batch(
        images_BCHW=images_BCHW.contiguous(memory_format=torch.channels_last),
        targets=targets,
        labelled=dict.fromkeys(targets, everywhere),
        valid_B=everywhere,
        positions_B=torch.arange(num),
        keys=[""] * num,
    )
    return batch.to(device)


def build_parts(scene: Scene) -> tuple[MultitaskModel, dict[str, Task]]:
    """The model, the same at every call, and its tasks."""
    torch.manual_seed(0)
    classes = tuple(map(str, range(NUM_CLASSES)))
    task_infos = {
        name: TaskInfo(kind, classes=classes, num_labelled=100, class_counts=(10,) * NUM_CLASSES)
        for name, kind in scene.kinds.items()
    }
    settings: dict[str, TaskSettings] = {
        name: SegmentationSettings() if kind == "segmentation" else ClassificationSettings()
        for name, kind in scene.kinds.items()
    }
    tasks = build_tasks(settings, task_infos)
    size = (scene.image_size, scene.image_size)
    model_settings = ModelSettings(backbone=scene.backbone, checkpointing=scene.checkpointing)
    model = build_model(model_settings, [task.head for task in tasks.values()], 3, size)
    model.use_memory_format(torch.channels_last if scene.channels_last else torch.contiguous_format)
    return model, tasks


def build_trainer(
    scene: Scene,
    connection: Connection,
    balance: Mapping[str, Any] = EQUAL,
    writer: CheckpointWriter | None = None,
    checkpoint_every: int | None = None,
) -> Trainer:
    """The trainer as a run has it, without a run folder."""
    world = connection.world
    model, tasks = build_parts(scene)
    adapter: TypeAdapter[BalanceSettings] = TypeAdapter(BalanceSettings)
    settings = adapter.validate_python(dict(balance))
    factors = {name: task.settings.noise_factor for name, task in tasks.items()}
    balancer = build_balancer(settings, list(tasks), factors, dict.fromkeys(tasks, 1.0))
    root = RootModule(model, tasks, balancer, world, scene.precision)
    if scene.compiled:
        compile_parts(model, world.device, recomputing=scene.checkpointing != "off")
    optimizer = build_optimizer(scene.optim, model, list(tasks), list(balancer.parameters()))
    engine = connection.build(root, optimizer, [root.task_parameters(name) for name in tasks])
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
        balancing=Balancing(root, engine, seed=0),
        optim=scene.optim,
        plan=plan,
        monitor=Monitor(MonitorSettings(), "min", ConstantSchedule()),
        ema=None,
        evaluate=None,
        writer=writer,
        tracker=Tracker(None),
        figures=RunFigures(None),
        stop=StopSignal(),
        recipe_text="",
        data_text="",
        max_bad_steps=0,
    )
