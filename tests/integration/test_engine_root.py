"""The real root module (model, losses, balancing) under every engine: the numbers of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partialmethod
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2, VisionTransformer, shufflenetv2, vision_transformer

from mtl_dist.balance.cagrad import CAGrad
from mtl_dist.balance.famo import FAMO
from mtl_dist.balance.fixed import Fixed
from mtl_dist.balance.methods import build_balancer
from mtl_dist.balance.mgda import MGDA
from mtl_dist.balance.pcgrad import PCGrad
from mtl_dist.balance.uncertainty import Uncertainty
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.config.settings import Settings
from mtl_dist.engine.connect import connect
from mtl_dist.engine.settings import EngineSettings, Precision
from mtl_dist.models.building import build_model
from mtl_dist.models.compiling import compile_parts
from mtl_dist.models.settings import Checkpointing, ModelSettings
from mtl_dist.optim import OptimSettings, build_optimizer
from mtl_dist.specs import TaskInfo
from mtl_dist.step import RootModule, WindowTotals, count_labels
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tasks.regression import RegressionSettings
from mtl_dist.tasks.segmentation import SegmentationSettings
from tests.batch_partition import micro_batches
from tests.ranks import shared_pool
from tests.tiny_training import whole_up_to

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 8
NUM_STEPS = 3
INFOS = {
    "kind": TaskInfo("classification", classes=("a", "b", "c"), num_labelled=9, class_counts=(3, 3, 3)),
    "age": TaskInfo("regression", num_labelled=9, mean=40.0, std=10.0),
    "mask": TaskInfo("segmentation", classes=("no", "yes"), num_labelled=9, class_counts=(9, 9)),
}
TASKS = {"kind": ClassificationSettings(), "age": RegressionSettings(), "mask": SegmentationSettings()}

METHODS: dict[str, Settings] = {
    "fixed": Fixed(),
    "uncertainty": Uncertainty(),
    "famo": FAMO(),
    "mgda at features": MGDA(level="features"),
    "cagrad at features": CAGrad(level="features"),
    "pcgrad at parameters": PCGrad(level="parameters"),
}


@dataclass(frozen=True)
class Case:
    """One training of NUM_STEPS steps."""

    method: str = "fixed"
    zero_stage: int | None = None
    """None: accelerate."""
    accumulation: int = 1
    backbone: str = "simple_cnn"
    checkpointing: Checkpointing = "off"
    precision: Precision = "fp32"
    size: int = 8
    """Height and width of the images."""
    compiled: Literal["", "aot_eager", "inductor"] = ""
    """By which of torch.compile's backends: the first writes no code that would have to be compiled."""


@dataclass
class Trained:
    """Each step's loss sums over the whole global batch, and on rank 0 the weights at the end."""

    sums: list[list[float]]
    model: dict[str, Tensor]


def global_batch(step: int, size: int) -> Batch:
    """Random images, a third of the labels missing; age has none in the second step."""
    generator = torch.Generator().manual_seed(step)

    def labelled() -> Tensor:
        return torch.rand(GLOBAL_BATCH, generator=generator) > 1 / 3

    present = {name: labelled() & (name != "age" or step != 1) for name in INFOS}
    mask = torch.randint(0, 2, (GLOBAL_BATCH, size, size), generator=generator).to(torch.uint8)
    mask[~present["mask"]] = 255
    return Batch(
        images_BCHW=torch.randint(0, 256, (GLOBAL_BATCH, 3, size, size), generator=generator).to(torch.uint8),
        targets={
            "kind": torch.randint(0, 3, (GLOBAL_BATCH,), generator=generator) * present["kind"],
            "age": torch.randn(GLOBAL_BATCH, generator=generator) * 10 + 40,
            "mask": mask,
        },
        labelled=present,
        valid_B=torch.ones(GLOBAL_BATCH, dtype=torch.bool),
        positions_B=torch.arange(GLOBAL_BATCH),
        keys=[""] * GLOBAL_BATCH,
    )


def small_transformer(patch_size: int, **others: Any) -> nn.Module:
    """torchvision's vision transformer of one layer; its class token is a parameter of no layer's own."""
    return VisionTransformer(32, patch_size, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)


def small_shufflenet(
    weights: None, progress: bool, repeats: list[int], channels: list[int], **others: Any
) -> nn.Module:
    """torchvision's, of fewer blocks: one stage has several."""
    return ShuffleNetV2([1, 2, 1], channels, **others)


@whole_up_to(0)
def train_root(case: Case) -> Trained:
    """Run on every rank."""
    connection = connect(EngineSettings(zero_stage=case.zero_stage), case.precision)  # type: ignore[arg-type]
    world = connection.world
    torch.manual_seed(0)
    tasks = build_tasks(TASKS, INFOS)
    model_settings = ModelSettings(backbone=case.backbone, norm="group", checkpointing=case.checkpointing)
    heads = [task.head for task in tasks.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_transformer, "_vision_transformer", small_transformer)
        patch.setattr(shufflenetv2, "_shufflenetv2", small_shufflenet)
        model = build_model(model_settings, heads, 3, (case.size, case.size))
    if case.compiled:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=case.compiled))
            compile_parts(model, world.device, recomputing=case.checkpointing != "off")
    balancer = build_balancer(
        METHODS[case.method],  # type: ignore[arg-type]
        list(tasks),
        {name: task.settings.noise_factor for name, task in tasks.items()},
        dict.fromkeys(tasks, 1.0),
    )
    root = RootModule(model, tasks, balancer, world, case.precision)
    for module in root.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = build_optimizer(
        OptimSettings(kind="sgd", lr=1e-2), model, list(tasks), list(balancer.parameters())
    )
    engine = connection.build(root, optimizer, [root.task_parameters(name) for name in tasks])
    balancing = Balancing(root, engine, seed=0)
    sums = []
    for step in range(NUM_STEPS):
        window = micro_batches(global_batch(step, case.size), world.rank, world.size, case.accumulation)
        counts_T = world.sum(count_labels(tasks, window))
        totals = WindowTotals(counts_T, len(window), step)
        weights = balancing.solve(window, totals)
        local_sums_T = torch.zeros(len(tasks))
        for number, batch in enumerate(window, start=1):
            local_sums_T += engine.forward_backward(batch, totals, weights, last=number == len(window))[0]
        engine.step(root.absent_parameters(totals), clip_norm=1.0)
        balancing.observe(local_sums_T, totals)
        sums.append(world.sum(local_sums_T.double()).tolist())
    return Trained(sums, engine.full_state().model)


def train_cases(cases: Sequence[Case]) -> list[Trained]:
    return [train_root(case) for case in cases]


@cache
def alone(case: Case) -> Trained:
    return shared_pool(1).run(train_root, case)[0]


def assert_same(found: Trained, expected: Trained, note: Any) -> None:
    for step, (ours, theirs) in enumerate(zip(found.sums, expected.sums, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), (note, step)
    assert found.model.keys() == expected.model.keys()
    for name, weight in expected.model.items():
        torch.testing.assert_close(
            found.model[name], weight, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{note} {n}: {text}"
        )


STAGES = (None, 0, 1, 2, 3)


@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_of_any_engine_train_like_one_process(zero_stage: int | None, turned: bool) -> None:
    """Every method under every engine; accumulation is 1 and 2 in turn, and the other one where `turned`."""
    cases = [
        Case(method, zero_stage, 1 + (number + STAGES.index(zero_stage) + turned) % 2)
        for number, method in enumerate(METHODS)
        # The gradients of whole shared weights, which ZeRO 3 does not have.
        if not (zero_stage == 3 and "parameters" in method)
    ]
    for case, found in zip(cases, shared_pool(2).run(train_cases, cases)[0], strict=True):
        assert_same(found, alone(replace(case, zero_stage=None, accumulation=1)), case)


@pytest.mark.parametrize("zero_stage", [None, 1, 2, 3])
def test_gradient_checkpointing_changes_nothing_under_any_engine(zero_stage: int | None) -> None:
    plain = Case("mgda at features", zero_stage, backbone="shufflenet_v2_x0_5", size=32)
    cases = [plain, replace(plain, checkpointing="stage"), replace(plain, checkpointing="block")]
    expected, *others = shared_pool(2).run(train_cases, cases)[0]
    for case, found in zip(cases[1:], others, strict=True):
        assert found.sums == expected.sums, case
        for name, weight in expected.model.items():
            assert torch.equal(found.model[name], weight), (case, name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_the_same_under_every_engine(precision: Precision) -> None:
    cases = [Case(zero_stage=stage, precision=precision) for stage in (None, 0, 1, 2, 3)]
    expected, *others = shared_pool(2).run(train_cases, cases)[0]
    for case, found in zip(cases[1:], others, strict=True):
        assert found.sums[0] == expected.sums[0], case
        for ours, theirs in zip(found.sums, expected.sums, strict=True):
            # Weights that differ in their last float32 bit may round to another neighbour.
            assert ours == pytest.approx(theirs, rel=2**-7), case


def test_zero_3_looks_at_a_transformer_before_its_micro_batches() -> None:
    case = Case("mgda at features", 3, accumulation=2, backbone="vit_b_16", size=32)
    found = shared_pool(2).run(train_root, case)[0]
    assert_same(found, alone(replace(case, zero_stage=None, accumulation=1)), case)


def assert_compiling_changes_nothing(size: int, cases: Sequence[Case], backend: str) -> None:
    plain = shared_pool(size).run(train_cases, cases)[0]
    compiled = [replace(case, compiled=backend) for case in cases]  # type: ignore[arg-type]
    for case, expected, found in zip(
        cases, plain, shared_pool(size).run(train_cases, compiled)[0], strict=True
    ):
        for ours, theirs in zip(found.sums, expected.sums, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), case
        assert found.model.keys() == expected.model.keys()
        for name, weight in expected.model.items():
            # An activation that is 0 but for rounding passes its gradient or does not.
            torch.testing.assert_close(found.model[name], weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "zero_stage", [None, 2, *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (0, 1))]
)
def test_compiled_parts_give_the_same_numbers_under_the_same_names(zero_stage: int | None) -> None:
    cases = [
        Case("fixed", zero_stage),
        Case("fixed", zero_stage, checkpointing="block"),
        Case("mgda at features", zero_stage, accumulation=2),
        Case("pcgrad at parameters", zero_stage),
    ]
    assert_compiling_changes_nothing(2, cases, "aot_eager")


@pytest.mark.exhaustive
def test_code_that_torch_writes_gives_the_same_numbers() -> None:
    assert_compiling_changes_nothing(1, [Case("pcgrad at parameters")], "inductor")
