"""The root module's balancing on one process: who gets which gradient, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mtl_dist.balance.checks import check_balance
from mtl_dist.balance.methods import build_balancer
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.engine.connect import EngineChoice
from mtl_dist.engine.deepspeed_setup import ZeroStage
from mtl_dist.errors import UserError
from mtl_dist.gradients import (
    COLUMNS_IN_CACHE,
    JacobianMemory,
    products,
    with_gradient,
    without_side_effects,
)
from mtl_dist.step import RootModule, Weights, WindowTotals, count_labels
from mtl_dist.tasks.registry import build_tasks
from tests.tiny_balancing import (
    Balance,
    Case,
    Labels,
    build,
    connection_of,
    global_batch,
    micro_batches,
)
from tests.tiny_tasks import WORK

FEW = WORK["classes and numbers"]


def batch_of(labels: Labels, step: int) -> Batch:
    return global_batch(Case(Balance("equal"), labels), step)


def balancing_of(case: Case) -> Balancing:
    return build(case, connection_of("single", "fp32"))


def backward(balancing: Balancing, window: list[Batch], step: int = 0) -> WindowTotals:
    """The gradients of one window, left on the parameters."""
    root = balancing.root
    totals = WindowTotals(count_labels(root.tasks, window), len(window), step)
    weights = balancing.solve(window, totals)
    for number, batch in enumerate(window, start=1):
        balancing.engine.forward_backward(batch, totals, weights, last=number == len(window))
    return totals


def gradients_of(root: RootModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in root.named_parameters() if p.grad is not None}


def task_gradients(labels: Labels = "full") -> list[dict[str, Tensor]]:
    """Each task's own gradient, from a window in which only it is labelled."""
    found = []
    for name in FEW.infos:
        balancing = balancing_of(Case(Balance("equal")))
        batch = batch_of(labels, 0)
        only = {task: batch.labelled[task] & (task == name) for task in FEW.infos}
        backward(balancing, [replace(batch, labelled=only)])
        found.append(gradients_of(balancing.root))
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scale_heads", [False, True])
@pytest.mark.parametrize("level", ["features", "parameters"])
def test_the_shared_part_gets_the_weighted_sum_and_each_head_its_own_gradient(
    level: str, scale_heads: bool, accumulation: int
) -> None:
    balancing = balancing_of(Case(Balance("nash", level, scale_heads=scale_heads)))  # type: ignore[arg-type]
    backward(balancing, micro_batches(batch_of("full", 0), 0, 1, accumulation))
    found, weights = gradients_of(balancing.root), balancing.balancer.last_weights_T
    assert weights.std() > 0.1
    own = task_gradients()
    for name in found:
        if name.startswith("model.backbone."):
            assert_same(found[name], sum(w * g[name] for w, g in zip(weights, own, strict=True)))
        for t, task in enumerate(FEW.infos):
            if name.startswith(f"model.heads.{task}."):
                assert_same(found[name], own[t][name] * (weights[t] if scale_heads else 1.0))


@pytest.mark.parametrize("level", ["features", "parameters"])
def test_the_gramian_is_that_of_the_tasks_own_gradients(level: str) -> None:
    balancing = balancing_of(Case(Balance("nash", level), diagnose_every=1))  # type: ignore[arg-type]
    found = balancing.diagnosis(backward(balancing, [batch_of("full", 0)]))
    assert found is not None
    if level == "parameters":
        rows = [
            torch.cat([g.flatten() for name, g in own.items() if name.startswith("model.backbone.")])
            for own in task_gradients()
        ]
        assert_same(found.lengths_T.float(), torch.stack([row.norm() for row in rows]))
        cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
        assert_same(found.cosines_TT[0, 1].float(), cosine)
    else:
        assert found.cosines_TT.isfinite().all() and (found.lengths_T > 0).all()


def test_pairs_without_a_common_sample_have_no_cosine_and_are_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    balancing = balancing_of(Case(Balance("cagrad", "features"), diagnose_every=1))
    for step in range(3):
        found = balancing.diagnosis(backward(balancing, [batch_of("disjoint", 0)], step))
        assert found is not None
        assert {name.split("/")[0] for name in found.scalars()} == {"gradient_norm"}
    assert sum("no conflict" in line for line in caplog.messages) == 1


def test_an_absent_task_is_in_no_diagnosis_and_gets_no_weight() -> None:
    balancing = balancing_of(Case(Balance("mgda", "parameters"), diagnose_every=1))
    totals = backward(balancing, [batch_of("partial", 1)])
    assert totals.present_T.tolist() == [True, True, False]
    found = balancing.diagnosis(totals)
    assert found is not None and not any("tags" in name for name in found.scalars())
    assert all(p.grad is None or not p.grad.any() for p in balancing.root.task_parameters("tags"))


@pytest.mark.parametrize("changes", [{"frozen": True}, {"sharing": "separate"}], ids=str)
def test_without_trained_shared_weights_there_is_nothing_to_compare(changes: dict[str, bool]) -> None:
    balancing = balancing_of(Case(Balance("equal"), diagnose_every=1).with_(**changes))
    assert balancing.why_no_diagnosis is not None
    assert balancing.diagnosis(backward(balancing, [batch_of("full", 0)])) is None


@pytest.mark.parametrize(
    "balance", [Balance("fixed"), Balance("famo"), Balance("nash", "parameters")], ids=str
)
def test_weights_are_known_before_the_forwards_unless_its_only_one_has_to_find_them(balance: Balance) -> None:
    balancing = balancing_of(Case(balance))
    for accumulation in (1, 2):
        window = micro_batches(batch_of("full", 0), 0, 1, accumulation)
        totals = WindowTotals(count_labels(balancing.root.tasks, window), len(window), 0)
        known = isinstance(balancing.solve(window, totals), Weights)
        assert known == (accumulation == 2 or balance.method == "fixed")


def test_reading_ahead_leaves_random_state_and_batch_statistics_as_they_were() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    state = torch.get_rng_state()
    with without_side_effects(norm, torch.device("cpu")):
        norm(torch.randn(8, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(torch.randn(8, 3))
    assert not torch.equal(norm.running_mean, before["running_mean"])


def test_a_gradient_handed_over_joins_the_scalars_own() -> None:
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    scalar = with_gradient((2 * first).sum(), [first, second], torch.arange(7.0))
    (3 * scalar).backward()
    assert torch.equal(first.grad, 6 + 3 * torch.arange(4.0).view(2, 2))
    assert torch.equal(second.grad, 3 * torch.arange(4.0, 7.0))


# ------------------------------------------------------------------ refusals
DDP = EngineChoice("accelerate")
SHARED = {name: ("vector",) for name in FEW.infos}


def zero(stage: ZeroStage) -> EngineChoice:
    return EngineChoice("deepspeed", stage)


@pytest.mark.parametrize(
    ("balance", "facts", "said"),
    [
        (Balance("nash", "parameters"), {"engine": zero(3)}, "expected features under ZeRO 3"),
        (Balance("graddrop"), {"engine": zero(1)}, "expected whole gradients"),
        (Balance("db-mtl"), {"engine": zero(2)}, "expected whole gradients"),
        (Balance("mgda", "features"), {"disjoint": [("kind", "tags")]}, "for kind and tags"),
        (
            Balance("mgda", "features"),
            {"features": SHARED | {"age": ("stride_1",)}},
            "none for kind and age",
        ),
        (Balance("cagrad", "features"), {"num_shared": 0}, "expected weights that the tasks share"),
        (Balance("graddrop"), {"num_shared": 0, "engine": DDP}, "expected weights that the tasks share"),
    ],
    ids=str,
)
def test_what_would_be_wrong_is_refused_in_one_line(
    balance: Balance, facts: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(balance, facts)
    line = str(caught.value)
    assert said in line and line.startswith("balance.") and "\n" not in line


@pytest.mark.parametrize(
    ("balance", "facts"),
    [
        (Balance("stch"), {"engine": zero(3), "num_shared": 0, "disjoint": [("kind", "tags")]}),
        (Balance("nash", "parameters"), {"engine": zero(2), "disjoint": [("kind", "tags")]}),
        (Balance("nash", "features"), {"engine": zero(3)}),
        (Balance("graddrop"), {"engine": DDP}),
        (Balance("db-mtl"), {"engine": zero(0)}),
    ],
    ids=str,
)
def test_what_is_right_is_not_refused(balance: Balance, facts: dict[str, object]) -> None:
    check(balance, facts)


def check(balance: Balance, changes: dict[str, object]) -> None:
    tasks = build_tasks(FEW.settings, FEW.infos)
    factors = {name: task.settings.noise_factor for name, task in tasks.items()}
    balancer = build_balancer(balance.settings(), list(tasks), factors, dict.fromkeys(tasks, 1.0))
    facts: dict[str, object] = {
        "engine": zero(0),
        "num_shared": 4,
        "features": SHARED,
        "disjoint": [],
    }
    check_balance(balancer, balance.method, **(facts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_columns", [1, 5, COLUMNS_IN_CACHE, 2 * COLUMNS_IN_CACHE + 3])
def test_products_in_pieces_are_the_products_of_whole_rows(num_columns: int) -> None:
    rows_TP = torch.randn(4, num_columns, generator=torch.Generator().manual_seed(1))
    expected = (rows_TP.double() @ rows_TP.double().T).float()
    torch.testing.assert_close(products(rows_TP), expected, rtol=1e-5, atol=1e-5 * num_columns**0.5)


def test_gradients_of_every_window_lie_in_the_same_memory_on_a_cpu() -> None:
    memory, cpu = JacobianMemory(), torch.device("cpu")
    first = memory.take(3, 7, cpu)
    assert memory.take(3, 7, cpu).data_ptr() == first.data_ptr()
    assert memory.take(2, 7, cpu).shape == (2, 7)
