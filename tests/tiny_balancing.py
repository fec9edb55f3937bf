"""A small multi-task training through the root module, for every method of balancing.

A few tasks (`tiny_tasks`) on a small network without dropout. The global batches are pure functions of tasks,
labels and step, so any engine, on any number of ranks and with any accumulation, must get the same weights of
the tasks and the same weights of the model.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from mtl_dist.balance.checks import check_balance
from mtl_dist.balance.gradient import GradientMethod
from mtl_dist.balance.methods import METHODS, BalanceSettings, build_balancer
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.engine.connect import Connection, connect
from mtl_dist.engine.settings import EngineSettings, Precision
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import Checkpointing, ModelSettings
from mtl_dist.models.sharing.hard import Hard
from mtl_dist.models.whole import WholeModel
from mtl_dist.optim import OptimSettings, build_optimizer
from mtl_dist.step import RootModule, WindowTotals, count_labels
from mtl_dist.tasks.registry import build_tasks
from tests.batch_partition import micro_batches
from tests.tiny_tasks import WORK, TaskSet, Work
from tests.tiny_training import whole_up_to

GLOBAL_BATCH = 8
SEED = 5

Labels = Literal["full", "partial", "disjoint"]
"""partial: 40% missing, and none at all of every third task in every second window; disjoint: one label a
sample."""
EngineName = Literal["single", "ddp", "zero1", "zero2", "zero3"]

LOSS_METHODS = ("equal", "fixed", "uncertainty", "dwa", "rlw", "gls", "stch", "famo", "imtl-l")
JACOBIAN_METHODS = ("graddrop", "db-mtl")
GRAMIAN_METHODS = tuple(
    sorted(
        settings.model_fields["method"].default
        for settings in METHODS
        if issubclass(settings, GradientMethod)
    )
)


@dataclass(frozen=True)
class Balance:
    """What stands under `balance:` in a recipe."""

    method: str
    level: Literal["features", "parameters"] | None = None
    every: int = 1
    scale_heads: bool = False

    def settings(self) -> BalanceSettings:
        stated: dict[str, Any] = {"method": self.method}
        if self.level is not None:
            stated |= {"level": self.level, "every": self.every, "scale_heads": self.scale_heads}
        adapter: TypeAdapter[BalanceSettings] = TypeAdapter(BalanceSettings)
        return adapter.validate_python(stated)

    def __str__(self) -> str:
        return self.method if self.level is None else f"{self.method} at {self.level}"


BALANCES = (
    *(Balance(method) for method in LOSS_METHODS),
    *(Balance(method, level) for method in GRAMIAN_METHODS for level in ("features", "parameters")),
    *(Balance(method) for method in JACOBIAN_METHODS),
)


@dataclass(frozen=True)
class Case:
    """One training of a few steps."""

    balance: Balance
    labels: Labels = "full"
    accumulation: int = 1
    precision: Precision = "fp32"
    checkpointing: Checkpointing = "off"
    num_steps: int = 3
    explode_at: tuple[int, ...] = ()
    """Steps in which rank 0 sees infinite pixels."""
    diagnose_every: int = 0
    frozen: bool = False
    sharing: str = "hard"
    network: bool = False
    """Whether the model is a whole one of the user's, which has the same parts."""
    tasks: TaskSet = "classes and numbers"

    @property
    def work(self) -> Work:
        return WORK[self.tasks]

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass
class Result:
    """What came out: the tasks' weights after each step, and on rank 0 the model and what it was at first.

    `refusal` is the line that ended it before it began.
    """

    refusal: str = ""
    weights: list[Tensor] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    model: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[bool] = field(default_factory=list)
    diagnoses: list[dict[str, float]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def num_unconverged(self) -> int:
        return int(self.model["balancer.num_unconverged"])


def global_batch(case: Case, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    num, work = GLOBAL_BATCH, case.work

    def labelled(number: int, name: str) -> Tensor:
        if case.labels == "disjoint":
            return torch.arange(num) % len(work.infos) == number
        if case.labels == "full":
            return torch.ones(num, dtype=torch.bool)
        if name in work.sometimes_absent and step % 2:
            return torch.zeros(num, dtype=torch.bool)
        return torch.rand(num, generator=generator) >= 0.4

    has = {name: labelled(number, name) for number, name in enumerate(work.infos)}
    return Batch(
        images_BCHW=torch.rand(num, 1, work.size, work.size, generator=generator) * 255,
        targets=work.targets(num, generator),
        labelled=has,
        valid_B=torch.ones(num, dtype=torch.bool),
        positions_B=torch.arange(num),
        keys=[str(number) for number in range(num)],
    )


def connection_of(engine: EngineName, precision: Precision) -> Connection:
    deepspeed = engine.startswith("zero")
    settings = EngineSettings(
        kind="deepspeed" if deepspeed else "accelerate",
        zero_stage=int(engine[4]) if deepspeed else None,  # type: ignore[arg-type]
    )
    return connect(settings, precision)


class Parts(torch.nn.Module):
    """The parts of a model of the package, as a network from normalised images to outputs."""

    def __init__(self, model: MultitaskModel) -> None:
        super().__init__()
        assert isinstance(model, Hard)
        self.backbone, self.heads = model.backbone, model.heads

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        size = (images.shape[2], images.shape[3])
        return {
            task: head({name: features[name] for name in head.reads}, size)
            for task, head in self.heads.items()
        }


def build_root(case: Case, world: World) -> RootModule:
    torch.manual_seed(7)
    work = case.work
    tasks = build_tasks(work.settings, work.infos)
    model_settings = ModelSettings.model_validate(
        {
            **work.model,
            "norm": "group",
            "checkpointing": case.checkpointing,
            "frozen": case.frozen,
            "sharing": case.sharing,
        }
    )
    heads = [task.head for task in tasks.values()]
    size = (work.size, work.size)
    model = build_model(model_settings, heads, 1, size)
    if case.network:
        mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
        model = WholeModel(Parts(model), heads, size, mean, std)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    factors = {name: task.settings.noise_factor for name, task in tasks.items()}
    balancer = build_balancer(case.balance.settings(), list(tasks), factors, dict.fromkeys(tasks, 1.0))
    return RootModule(model, tasks, balancer, world, case.precision)


def refusal(case: Case, connection: Connection) -> str:
    """What a run would say at its start; nothing where it may begin."""
    root = build_root(case, connection.world)
    try:
        check_balance(
            root.balancer,
            case.balance.method,
            engine=connection.choice,
            num_shared=len(root.shared),
            features={name: root.model.feature_names(name) for name in root.tasks},
            disjoint=[("kind", "age")] if case.labels == "disjoint" else [],
            meet_at_features=root.model.compared_at_features,
        )
    except UserError as error:
        return str(error)
    return ""


def build(case: Case, connection: Connection) -> Balancing:
    root = build_root(case, connection.world)
    # One step of plain SGD moves every weight by a known part of its gradient.
    optim = OptimSettings(kind="sgd", lr=0.05, momentum=0.0, weight_decay=0.0)
    optimizer = build_optimizer(optim, root.model, list(root.tasks), list(root.balancer.parameters()))
    parts = [root.task_parameters(name) for name in root.tasks]
    with whole_up_to(0):  # small weights are divided as large ones are
        engine = connection.build(root, optimizer, parts)
    return Balancing(root, engine, SEED, case.diagnose_every)


def train(engine: EngineName, case: Case) -> Result:
    """Run on every rank."""
    return train_all(engine, [case])[0]


def train_all(engine: EngineName, cases: Sequence[Case]) -> list[Result]:
    """`train`, one after another, in one call of a pool; what is built alike is built once."""
    # DeepSpeed collects garbage at every turn, which is slow among all that its import leaves.
    gc.freeze()
    results: dict[Case, Result] = {}
    for case in cases:
        if case not in results:
            alike = [other for other in cases if _built(other) == _built(case)]
            results |= zip(alike, _train_alike(engine, alike), strict=True)
    gc.collect()
    return [results[case] for case in cases]


def _built(case: Case) -> Case:
    """What decides how a case is built (labels alone decide whether it is refused)."""
    return case.with_(labels="full", accumulation=1, num_steps=1, explode_at=())


def _train_alike(engine_name: EngineName, cases: Sequence[Case]) -> list[Result]:
    connection = connection_of(engine_name, cases[0].precision)
    refusals = [refusal(case, connection) for case in cases]
    if all(refusals):
        return [Result(refusal=line) for line in refusals]
    balancing = build(cases[0], connection)
    engine = balancing.engine
    whole = engine.full_state()
    start = connection.world.broadcast(whole)
    results = []
    for case, line in zip(cases, refusals, strict=True):
        if line:
            results.append(Result(refusal=line))
            continue
        engine.load_full_state(start.model, start.optimizer, start.scaler)
        results.append(_train(balancing, case, start.model))
    return results


def _train(balancing: Balancing, case: Case, start: dict[str, Tensor]) -> Result:
    result = Result(start=start)
    heard = _Heard(result.log)
    logging.getLogger("mtl_dist").addHandler(heard)
    engine, root = balancing.engine, balancing.root
    world = engine.world
    for step in range(case.num_steps):
        window = micro_batches(global_batch(case, step), world.rank, world.size, case.accumulation)
        totals = WindowTotals(world.sum(count_labels(root.tasks, window)), len(window), step)
        if step in case.explode_at and world.is_main:
            window[0].images_BCHW[0] = 1e30
        weights = balancing.solve(window, totals)
        sums_T = torch.zeros(len(root.tasks))
        for number, batch in enumerate(window, start=1):
            sums_T += engine.forward_backward(batch, totals, weights, last=number == len(window))[0]
        result.skipped.append(engine.step(root.absent_parameters(totals), None).skipped)
        balancing.observe(sums_T, totals)
        root.balancer.end_epoch()
        found = balancing.diagnosis(totals)
        result.diagnoses.append({} if found is None else found.scalars())
        result.weights.append(root.balancer.last_weights_T.clone())
    result.model = engine.full_state().model
    logging.getLogger("mtl_dist").removeHandler(heard)
    return result


@cache
def reference(case: Case) -> Result:
    """The same training in this process, with whole windows."""
    return train("single", case.with_(accumulation=1))


def difference(found: Result, expected: Result) -> float:
    """The largest difference between two trainings: of a task's weight, in parts of the largest weight of the
    step; of an entry of the model, in parts of the largest change that the training made to any entry."""
    parts = [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(found.weights, expected.weights, strict=True)
    ]
    names = [name for name in expected.model if not name.startswith("balancer.")]
    change = max(float((expected.model[name] - expected.start[name]).abs().max()) for name in names)
    parts += [float((found.model[name] - expected.model[name]).abs().max()) / change for name in names]
    # max() would pass over a NaN.
    return max(parts) if all(part == part for part in parts) else float("nan")


class _Heard(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
