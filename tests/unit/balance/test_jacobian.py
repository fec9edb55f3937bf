"""graddrop and db-mtl: the update comes from the whole Jacobian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_dist.balance.balancer import Balancer
from mtl_dist.balance.db_mtl import DBMTL
from mtl_dist.balance.graddrop import GradDrop
from mtl_dist.balance.methods import build_balancer

METHODS: list[Any] = [
    GradDrop(),
    GradDrop(leak=0.3),
    DBMTL(),
    DBMTL(beta_decay=0.5),
]
every_method = pytest.mark.parametrize("settings", METHODS, ids=str)
ALL = torch.ones(3, dtype=torch.bool)
PARTLY = torch.tensor([True, False, True])
LOSSES = torch.tensor([0.5, 1.0, 4.0])


def build(settings: Any) -> Balancer:
    names = ("a", "b", "c")
    return build_balancer(settings, names, dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))


def jacobian(seed: int) -> Tensor:
    return torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))


@every_method
def test_an_absent_task_takes_no_part_whatever_its_row_holds(settings: Any) -> None:
    updates = []
    for nothing in (0.0, 1e3, math.nan):
        balancer, jacobian_TP, losses_T = build(settings), jacobian(0), LOSSES.clone()
        balancer.aggregate(jacobian(9), losses_T=LOSSES, present_T=ALL, key=(0, 0))
        jacobian_TP[1], losses_T[1] = nothing, nothing
        updates.append(balancer.aggregate(jacobian_TP, losses_T=losses_T, present_T=PARTLY, key=(0, 1)))
    assert updates[0].isfinite().all()
    assert torch.equal(updates[0], updates[1]) and torch.equal(updates[0], updates[2])


@every_method
def test_a_jacobian_that_is_not_finite_gives_nan_is_counted_and_changes_no_state(settings: Any) -> None:
    disturbed, undisturbed = build(settings), build(settings)
    for balancer in (disturbed, undisturbed):
        balancer.aggregate(jacobian(0), losses_T=LOSSES, present_T=ALL, key=(0, 0))
    bad_TP = jacobian(1)
    bad_TP[0, 3] = math.inf
    assert disturbed.aggregate(bad_TP, losses_T=LOSSES, present_T=ALL, key=(0, 1)).isnan().all()
    disturbed.weights(present_T=ALL, key=(0, 1), losses_T=LOSSES)
    assert disturbed.num_unconverged == 1
    bad_T = torch.tensor([0.5, math.nan, 4.0])
    assert disturbed.aggregate(jacobian(1), losses_T=bad_T, present_T=ALL, key=(0, 2)).isnan().all()
    disturbed.weights(present_T=ALL, key=(0, 2), losses_T=bad_T)
    assert disturbed.num_unconverged == 2
    updates = [
        balancer.aggregate(jacobian(3), losses_T=LOSSES, present_T=ALL, key=(0, 3))
        for balancer in (disturbed, undisturbed)
    ]
    assert torch.equal(*updates)


@every_method
def test_resuming_from_the_state_dict_equals_never_stopping(settings: Any) -> None:
    def run(balancer: Balancer, steps: range) -> list[list[float]]:
        return [
            balancer.aggregate(jacobian(step), losses_T=LOSSES, present_T=ALL, key=(7, step)).tolist()
            for step in steps
        ]

    never_stopped, stopped, resumed = build(settings), build(settings), build(settings)
    expected = run(never_stopped, range(6))
    first = run(stopped, range(3))
    resumed.load_state_dict(stopped.state_dict())
    assert first + run(resumed, range(3, 6)) == expected


@every_method
def test_a_balancer_that_has_worked_may_begin_again_from_its_first_state(settings: Any) -> None:
    balancer = build(settings)
    start = {name: value.clone() for name, value in balancer.state_dict().items()}
    updates = []
    for _ in range(2):
        balancer.load_state_dict(start)
        updates.append(balancer.aggregate(jacobian(0), losses_T=LOSSES, present_T=ALL, key=(7, 0)))
    assert torch.equal(*updates)


@every_method
def test_the_heads_get_their_plain_gradients(settings: Any) -> None:
    balancer = build(settings)
    assert balancer.needs_at(5) == "jacobian" and not balancer.scale_heads
    assert balancer.weights(present_T=PARTLY, key=(0, 0)).tolist() == [1.0, 0.0, 1.0]


def test_graddrop_keeps_one_sign_per_coordinate_as_often_as_its_majority() -> None:
    jacobian_TP = torch.tensor([[3.0], [1.0], [-1.0]]).expand(3, 20000)
    update_P = build(GradDrop()).aggregate(jacobian_TP, losses_T=LOSSES, present_T=ALL, key=(0, 0))
    assert set(update_P.tolist()) == {4.0, -1.0}
    # P = (1 + 3/5) / 2 = 0.8; five standard deviations of 20,000 draws are 0.014.
    assert (update_P > 0).float().mean().item() == pytest.approx(0.8, abs=0.015)


def test_graddrop_with_full_leak_is_the_sum() -> None:
    update_P = build(GradDrop(leak=1.0)).aggregate(jacobian(0), losses_T=LOSSES, present_T=ALL, key=(0, 0))
    torch.testing.assert_close(update_P, jacobian(0).sum(dim=0))


def test_graddrop_draws_by_seed_and_step() -> None:
    balancer = build(GradDrop())
    draws = [
        balancer.aggregate(jacobian(0), losses_T=LOSSES, present_T=ALL, key=(3, step)) for step in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_db_mtl_follows_its_formula() -> None:
    balancer = build(DBMTL(beta=0.9, beta_decay=0.5))
    average_TP = torch.zeros(3, 50)
    for step in range(1, 5):
        beta = 0.9 / step**0.5
        average_TP = beta * average_TP + (1 - beta) * jacobian(step) / LOSSES[:, None]
        lengths_T = average_TP.norm(dim=1)
        expected_P = ((lengths_T.max() / lengths_T)[:, None] * average_TP).sum(dim=0)
        found_P = balancer.aggregate(jacobian(step), losses_T=LOSSES, present_T=ALL, key=(0, step))
        torch.testing.assert_close(found_P, expected_P, rtol=1e-5, atol=1e-5)


def test_db_mtl_leaves_the_average_of_an_absent_task_as_it_was() -> None:
    balancer = build(DBMTL())
    balancer.aggregate(jacobian(0), losses_T=LOSSES, present_T=ALL, key=(0, 0))
    before = balancer.state_dict()["averages_TP"].clone()
    balancer.aggregate(jacobian(1), losses_T=LOSSES, present_T=PARTLY, key=(0, 1))
    after = balancer.state_dict()["averages_TP"]
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
    assert balancer.state_dict()["num_updates_T"].tolist() == [2, 1, 2]
