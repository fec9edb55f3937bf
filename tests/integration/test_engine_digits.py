"""The parity test: the digits recipe's model, 20 steps, under every engine, however labels lie and batches
are cut, against a plain PyTorch loop over whole batches in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from mtl_dist.assemble import build_root
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.config.loading import load_settings
from mtl_dist.engine.connect import connect
from mtl_dist.engine.settings import EngineSettings, Precision
from mtl_dist.engine.world import World
from mtl_dist.models.settings import NormKind
from mtl_dist.optim import OptimSettings, build_optimizer, learning_rate_factor, set_learning_rate
from mtl_dist.recipe import Recipe
from mtl_dist.run_folder import DataFacts
from mtl_dist.specs import TaskInfo
from mtl_dist.step import RootModule, WindowTotals, count_labels
from tests.batch_partition import micro_batches
from tests.pairwise import pairwise
from tests.ranks import shared_pool
from tests.tiny_training import whole_up_to

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "configs" / "digits.yaml"
NUM_STEPS = 20
GLOBAL_BATCH = 8
SIZE = 32
LR, EPS = 5e-4, 1e-3
"""What keeps a rounding error small over 20 steps. At the recipe's own rate, eight times this, a plain loop
whose weights begin one last bit away is off by 3e-5 in the end; at this one by 2e-7. And AdamW divides a
gradient by its own size: one that is 0 but for rounding becomes a whole step to either side; `eps` keeps that
step as small as the gradient."""
INFOS = {
    "digit": TaskInfo(
        "classification", classes=tuple("0123456789"), num_labelled=100, class_counts=(10,) * 10
    ),
    "thickness": TaskInfo("regression", num_labelled=100, mean=3.0, std=0.5),
    "ink": TaskInfo("segmentation", classes=("paper", "ink"), num_labelled=100, class_counts=(900, 100)),
}

Labels = Literal["all", "third_missing", "disjoint"]
LABELS: tuple[Labels, ...] = ("all", "third_missing", "disjoint")
ENGINES: list[tuple[int | None, int]] = [(None, 1), (None, 2), (0, 2), (1, 2), (2, 2), (3, 2)]
"""ZeRO's stage (None: accelerate) and the number of ranks."""
IDS = ["one process", "DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"]


@dataclass(frozen=True)
class Case:
    zero_stage: int | None = None
    labels: Labels = "all"
    accumulation: int = 1
    precision: Precision = "fp32"
    norm: NormKind = "group"
    plain_step: bool = False
    """One step that moves every weight by its gradient, instead of NUM_STEPS of the recipe's optimizer."""

    @property
    def num_steps(self) -> int:
        return 1 if self.plain_step else NUM_STEPS


@dataclass
class Trained:
    """Every step's loss per task, and on rank 0 the weights at the end."""

    losses: list[list[float]]
    model: dict[str, Tensor]


def global_batch(step: int, labels: Labels) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images_BCHW = torch.randint(0, 256, (GLOBAL_BATCH, 1, SIZE, SIZE), generator=generator)
    labelled = {}
    for t, name in enumerate(INFOS):
        labelled[name] = torch.ones(GLOBAL_BATCH, dtype=torch.bool)
        if labels == "third_missing":
            labelled[name] = torch.rand(GLOBAL_BATCH, generator=generator) > 1 / 3
        elif labels == "disjoint":
            # In blocks, so that no rank has all tasks.
            labelled[name] = torch.arange(GLOBAL_BATCH) * len(INFOS) // GLOBAL_BATCH == t
    mask_BHW = (images_BCHW[:, 0] > 128).to(torch.uint8)
    mask_BHW[~labelled["ink"]] = 255
    return Batch(
        images_BCHW=images_BCHW.to(torch.uint8).contiguous(memory_format=torch.channels_last),
        targets={
            "digit": torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator) * labelled["digit"],
            "thickness": (torch.randn(GLOBAL_BATCH, generator=generator) + 3) * labelled["thickness"],
            "ink": mask_BHW,
        },
        labelled=labelled,
        valid_B=torch.ones(GLOBAL_BATCH, dtype=torch.bool),
        positions_B=torch.arange(GLOBAL_BATCH),
        keys=[""] * GLOBAL_BATCH,
    )


def build(case: Case, world: World) -> tuple[Recipe, RootModule, torch.optim.Optimizer]:
    overrides = [f"model.norm={case.norm}", f"train.precision={case.precision}"]
    # DeepSpeed's weights are never channels_last; other kernels would round to bf16 elsewhere.
    overrides += [f"optim.lr={LR}", f"optim.eps={EPS}", f"train.channels_last={case.precision == 'fp32'}"]
    recipe = load_settings(Recipe, RECIPE, overrides)
    torch.manual_seed(0)
    root = build_root(recipe, DataFacts(INFOS, 1, "uint8", (SIZE, SIZE)), world)
    for module in root.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    settings = recipe.optim
    if case.plain_step:
        settings = OptimSettings(kind="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    return recipe, root, build_optimizer(settings, root.model, list(root.tasks), [])


def rate(recipe: Recipe, case: Case, step: int) -> float:
    return 1.0 if case.plain_step else learning_rate_factor(recipe.optim, step, NUM_STEPS, 0, 1.0)


@whole_up_to(0)
def train(case: Case) -> Trained:
    """Run on every rank."""
    connection = connect(EngineSettings(zero_stage=case.zero_stage), case.precision)  # type: ignore[arg-type]
    world = connection.world
    recipe, root, optimizer = build(case, world)
    engine = connection.build(root, optimizer, [root.task_parameters(name) for name in root.tasks])
    balancing = Balancing(root, engine, recipe.train.seed)
    losses = []
    for step in range(case.num_steps):
        set_learning_rate(optimizer, rate(recipe, case, step))
        batch = global_batch(step, case.labels)
        window = micro_batches(batch, world.rank, world.size, case.accumulation)
        counts_T = world.sum(count_labels(root.tasks, window))
        totals = WindowTotals(counts_T, len(window), step)
        weights = balancing.solve(window, totals)
        sums_T = torch.zeros(len(INFOS))
        for number, part in enumerate(window, start=1):
            sums_T += engine.forward_backward(part, totals, weights, last=number == len(window))[0]
        engine.step([], recipe.optim.clip_norm)
        losses.append((world.sum(sums_T.double()) / counts_T).tolist())
    return Trained(losses, engine.full_state().model)


def train_all(cases: Sequence[Case]) -> list[Trained]:
    return [train(case) for case in cases]


@cache
def plain(case: Case) -> Trained:
    """No engine, no root module, no balancing: the model, the losses' formulas, a torch optimizer."""
    recipe, root, optimizer = build(case, World(0, 1, 0, torch.device("cpu")))
    losses = []
    for step in range(case.num_steps):
        set_learning_rate(optimizer, rate(recipe, case, step))
        batch = global_batch(step, case.labels)
        outputs = root.model(batch.images_BCHW)
        means = []
        for name, task in root.tasks.items():
            target, labelled_B = batch.targets[name], batch.labelled[name]
            loss_sum = task.loss_sum(outputs[name], target, labelled_B)
            means.append(loss_sum / task.count(target, labelled_B))
        weights = [task.settings.weight for task in root.tasks.values()]
        sum(weight * mean for weight, mean in zip(weights, means, strict=True)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(mean.detach()) for mean in means])
    return Trained(losses, {name: t.detach().clone() for name, t in root.state_dict().items()})


@cache
def alone_in_bf16(case: Case) -> Trained:
    return shared_pool(1).run(train, case)[0]


def apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors in parts of the expected one's length."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("zero_stage", "num_ranks"), ENGINES, ids=IDS)
@pytest.mark.parametrize(
    "chosen",
    [pairwise(ENGINES, LABELS, (1, 2)), pytest.param(None, marks=pytest.mark.exhaustive)],
    ids=["every two", "all"],
)
def test_losses_and_weights_after_20_steps_are_those_of_a_plain_loop(
    zero_stage: int | None, num_ranks: int, chosen: list[tuple[tuple[int | None, int], Labels, int]] | None
) -> None:
    cases = [
        Case(engine[0], labels, accumulation)
        for engine, labels, accumulation in chosen or product(ENGINES, LABELS, (1, 2))
        if engine == (zero_stage, num_ranks)
    ]
    for case, found in zip(cases, shared_pool(num_ranks).run(train_all, cases)[0], strict=True):
        expected = plain(replace(case, zero_stage=None, accumulation=1))
        for ours, theirs in zip(found.losses, expected.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), case
        assert found.model.keys() == expected.model.keys()
        for name, weight in expected.model.items():
            if name.startswith("model."):
                assert apart(found.model[name], weight) < 1e-5, (case, name)


@pytest.mark.parametrize(("zero_stage", "num_ranks"), ENGINES, ids=IDS)
def test_the_gradient_of_every_head_is_that_of_a_plain_loop(zero_stage: int | None, num_ranks: int) -> None:
    cases = [
        Case(zero_stage, labels, accumulation, plain_step=True)
        for labels, accumulation in product(LABELS, (1, 2))
    ]
    cases += [Case(zero_stage, "disjoint", 2, norm="frozen", plain_step=True)]
    before = build(Case(), World(0, 1, 0, torch.device("cpu")))[1].state_dict()
    for case, found in zip(cases, shared_pool(num_ranks).run(train_all, cases)[0], strict=True):
        expected = plain(replace(case, zero_stage=None, accumulation=1))
        for name in before:
            if name.endswith(("weight", "bias")):
                gradient = before[name].double() - expected.model[name]
                ours = before[name].double() - found.model[name]
                # The difference of two weights is known to their last bit.
                last_bit = float(before[name].abs().max()) * 2**-23 * before[name].numel() ** 0.5
                assert gradient.norm() > 0, name
                assert (ours - gradient).norm() < 1e-5 * gradient.norm() + last_bit, (case, name)


@pytest.mark.parametrize(("zero_stage", "num_ranks"), ENGINES[1:], ids=IDS[1:])
def test_bf16_is_that_of_one_process_with_the_same_micro_batches(zero_stage: int, num_ranks: int) -> None:
    """The same micro-batches are rounded alike, and only float32 sums are taken in another order. A weight
    that differs in its last float32 bits may round to another bfloat16, 2^-8 away: no loss is off by more."""
    cases = [Case(zero_stage, labels, 1, "bf16") for labels in ("third_missing", "disjoint")]
    alone = [alone_in_bf16(replace(case, zero_stage=None, accumulation=num_ranks)) for case in cases]
    for case, found, expected in zip(
        cases, shared_pool(num_ranks).run(train_all, cases)[0], alone, strict=True
    ):
        assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-6), case
        for ours, theirs in zip(found.losses, expected.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=2**-8), case
        for name, weight in expected.model.items():
            assert apart(found.model[name], weight) < 2**-8, (case, name)
