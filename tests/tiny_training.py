"""A small multi-task training without data or model rooms: what the engines are compared on.

Three tasks on one body, a trained scale per task (as uncertainty weighting has it), labels that may be
missing anywhere. Every number is a pure function of the step, so any engine on any number of ranks must get
the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mtl_dist.engine import deepspeed_setup
from mtl_dist.engine.connect import connect
from mtl_dist.engine.engine import Engine, FullState, StepResult
from mtl_dist.engine.precision import AUTOCAST_DTYPES
from mtl_dist.engine.settings import EngineSettings, Precision
from mtl_dist.errors import UserError

TASKS = ("alpha", "beta", "gamma")
GLOBAL_BATCH = 8
NUM_INPUTS = 6

Labels = Literal["all", "third_missing", "disjoint", "sometimes_absent"]
EngineName = Literal["single", "ddp", "zero0", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Setup:
    """One training: how it is run, and what it is."""

    engine: EngineName = "single"
    labels: Labels = "all"
    accumulation: int = 1
    optimizer: Literal["adamw", "sgd", "plain_sgd"] = "adamw"
    clip_norm: float | None = None
    precision: Precision = "fp32"
    batch_norm: bool = False
    frozen_body: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: str = ""
    """More of DeepSpeed's configuration, as JSON."""
    first_step: int = 0
    last_step: int = 6
    resume_from: FullState | None = None
    explode_at: tuple[int, ...] = ()
    """Steps whose loss is made infinite, on rank 0 alone."""
    small_weight: int = 0
    """Elements up to which ZeRO 3 keeps a weight whole."""
    every_state: bool = False
    """Whether the state after every step is wanted, and not only the last one."""

    def with_(self, **changes: object) -> Setup:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass
class Result:
    """What came out; `state` is filled on rank 0."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    states: list[FullState] = field(default_factory=list)

    @property
    def state(self) -> FullState:
        return self.states[-1]


class TinyRoot(nn.Module):
    """`forward(batch, counts, num_ranks, scale)` is the scalar of one micro-batch, and again as a number;
    it has no outputs to show."""

    def __init__(self, precision: Precision, batch_norm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(16) if batch_norm else nn.LayerNorm(16)
        self.body = nn.Sequential(nn.Linear(NUM_INPUTS, 23), nn.Tanh(), nn.Linear(23, 16), norm, nn.Tanh())
        self.heads = nn.ModuleDict(
            {
                "alpha": nn.Linear(16, 5),
                "beta": nn.Linear(16, 1),
                "gamma": nn.Sequential(nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 3)),
            }
        )
        self.token = nn.Parameter(torch.full((16,), 0.1))
        """Read here, outside of any module of its own."""
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in TASKS})
        self.precision = precision
        self.explode = False

    def predict(self, inputs: Tensor) -> dict[str, Tensor]:
        dtype = AUTOCAST_DTYPES.get(self.precision)
        with torch.autocast(inputs.device.type, dtype, enabled=dtype is not None):
            features = self.body(inputs) + self.token
            outputs = {name: head(features) for name, head in self.heads.items()}
        return {name: output.float() for name, output in outputs.items()}

    def forward(
        self, batch: Mapping[str, Tensor], counts: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        outputs = self.predict(batch["inputs"])
        total = torch.zeros(())
        for t, name in enumerate(TASKS):
            labelled = batch[f"{name}/labelled"]
            output = torch.where(labelled[:, None], outputs[name], 0.0)
            errors = (output - batch[f"{name}/target"]).square().mean(1)
            weight = num_ranks / counts[t] if counts[t] > 0 else torch.zeros(())
            loss = torch.where(labelled, errors, 0.0).sum() * weight.float()
            log_variance = self.scales[name].sum()
            term = torch.exp(-log_variance) * loss + scale * log_variance / 2
            total = total + torch.where(counts[t] > 0, term, 0.0)
        return (total * float("inf") if self.explode else total), total.detach(), {}

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        return [*self.heads[task].parameters(), self.scales[task]]


def global_batch(step: int, labels: Labels) -> dict[str, Tensor]:
    """The samples of one optimizer step, over all ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(GLOBAL_BATCH, NUM_INPUTS, generator=generator)
    batch = {"inputs": inputs}
    for t, (name, size) in enumerate(zip(TASKS, (5, 1, 3), strict=True)):
        batch[f"{name}/target"] = torch.randn(GLOBAL_BATCH, size, generator=generator)
        keep = torch.ones(GLOBAL_BATCH, dtype=torch.bool)
        if labels == "third_missing":
            keep = torch.rand(GLOBAL_BATCH, generator=generator) > 1 / 3
        elif labels == "disjoint":
            # In blocks, so that the first of two ranks has another task than the second.
            keep = torch.arange(GLOBAL_BATCH) * len(TASKS) // GLOBAL_BATCH == t
        elif labels == "sometimes_absent" and name == "gamma":
            keep = torch.full((GLOBAL_BATCH,), step % 3 == 1)
        batch[f"{name}/labelled"] = keep
    return batch


def micro_batches(
    batch: Mapping[str, Tensor], rank: int, num_ranks: int, accumulation: int
) -> Iterator[dict[str, Tensor]]:
    """This rank's part of a global batch, cut into micro-batches."""
    size = GLOBAL_BATCH // num_ranks // accumulation
    for number in range(accumulation):
        start = (rank * accumulation + number) * size
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def label_counts(batch: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([batch[f"{name}/labelled"].sum() for name in TASKS])


def problem_of(setup: Setup) -> str:
    """The message of the UserError that ends a training."""
    try:
        train(setup)
    except UserError as error:
        return str(error)
    raise AssertionError("expected a UserError, found none")


def build_root(setup: Setup) -> TinyRoot:
    torch.manual_seed(7)
    root = TinyRoot(setup.precision, setup.batch_norm)
    root.body.requires_grad_(not setup.frozen_body)
    return root


def build_optimizer(setup: Setup, root: TinyRoot) -> torch.optim.Optimizer:
    body = [root.token, *(root.body.parameters() if not setup.frozen_body else ())]
    groups = [
        {"params": body, "name": "body", "lr": 1e-2},
        *({"params": list(root.heads[name].parameters()), "name": name, "lr": 3e-2} for name in TASKS),
        {"params": list(root.scales.parameters()), "name": "balance", "lr": 1e-2, "weight_decay": 0.0},
    ]
    if setup.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.1)
    if setup.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
    return torch.optim.SGD([group | {"lr": 1.0} for group in groups])


@contextmanager
def whole_up_to(num_elements: int) -> Iterator[None]:
    """ZeRO 3 keeps weights of so many elements whole. With 0, small ones are divided like large ones, so that
    it is seen at work. Also a decorator."""
    kept = deepspeed_setup.SMALL_WEIGHT
    deepspeed_setup.SMALL_WEIGHT = num_elements
    try:
        yield
    finally:
        deepspeed_setup.SMALL_WEIGHT = kept


def build_engine(setup: Setup) -> tuple[Engine, TinyRoot]:
    deepspeed = setup.engine.startswith("zero")
    settings = EngineSettings(
        kind="deepspeed" if deepspeed else "accelerate",
        zero_stage=int(setup.engine[4]) if deepspeed else None,  # type: ignore[arg-type]
        offload_optimizer=setup.offload_optimizer,
        offload_parameters=setup.offload_parameters,
        deepspeed=json.loads(setup.deepspeed or "{}"),
    )
    connection = connect(settings, setup.precision)
    root = build_root(setup)
    parts = [root.task_parameters(name) for name in TASKS]
    with whole_up_to(setup.small_weight):
        engine = connection.build(root, build_optimizer(setup, root), parts)
    return engine, root


def train_step(engine: Engine, root: TinyRoot, setup: Setup, step: int) -> tuple[StepResult, Tensor]:
    """One optimizer step, and this rank's part of the loss."""
    world = engine.world
    batch = global_batch(step, setup.labels)
    counts = label_counts(batch)
    local_loss = torch.zeros(())
    parts = list(micro_batches(batch, world.rank, world.size, setup.accumulation))
    for number, part in enumerate(parts, start=1):
        last = number == len(parts)
        sums, _ = engine.forward_backward(part, counts, world.size, 1 / setup.accumulation, last=last)
        local_loss += sums
    absent = [p for t, name in enumerate(TASKS) if counts[t] == 0 for p in root.task_parameters(name)]
    return engine.step(absent, setup.clip_norm), local_loss


def train(setup: Setup) -> Result:
    """Run on every rank; the losses are of the whole global batch."""
    engine, root = build_engine(setup)
    if setup.resume_from is not None:
        start = setup.resume_from
        engine.load_full_state(start.model, start.optimizer, start.scaler)
    result = Result()
    world = engine.world
    for step in range(setup.first_step, setup.last_step):
        root.explode = step in setup.explode_at and world.is_main
        outcome, local_loss = train_step(engine, root, setup, step)
        result.losses.append(float(world.sum(local_loss.double()) / world.size))
        result.grad_norms.append(float(outcome.grad_norm))
        result.skipped.append(outcome.skipped)
        if setup.every_state or step == setup.last_step - 1:
            result.states.append(engine.full_state())
    return result


def train_all(setups: Sequence[Setup]) -> list[Result]:
    """`train`, one after another, in one call of a pool."""
    return [train(setup) for setup in setups]


def reference(setup: Setup) -> Result:
    """The same training as a plain PyTorch loop over whole global batches: no engine, no ranks."""
    root = build_root(setup)
    optimizer = build_optimizer(setup, root)
    result = Result()
    names = {p: name for name, p in root.named_parameters()}
    for step in range(setup.first_step, setup.last_step):
        batch = global_batch(step, setup.labels)
        counts = label_counts(batch)
        loss, *_ = root(batch, counts, 1, 1.0)
        loss.backward()
        for t, name in enumerate(TASKS):
            if counts[t] == 0:
                for parameter in root.task_parameters(name):
                    parameter.grad = None
        trained = [p for p in root.parameters() if p.requires_grad and p.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, setup.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        result.losses.append(float(loss.detach()))
        result.grad_norms.append(float(norm))
        result.skipped.append(False)
        state = {
            f"{slot}/{names[p]}": value.clone()  # type: ignore[index]
            for p, slots in optimizer.state.items()
            for slot, value in slots.items()
            if isinstance(value, Tensor)
        }
        model = {name: tensor.clone() for name, tensor in root.state_dict().items()}
        if setup.every_state or step == setup.last_step - 1:
            result.states.append(FullState(model, state))
    return result
