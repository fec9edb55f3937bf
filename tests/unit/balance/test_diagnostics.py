"""What is read off a Gramian for people."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_dist.balance.diagnostics import diagnose

TASKS = ("digit", "thickness", "ink")
ALL = torch.ones(3, dtype=torch.bool)


def test_lengths_and_cosines_are_those_of_the_gradients() -> None:
    jacobian_TP = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = diagnose(TASKS, jacobian_TP @ jacobian_TP.T, ALL)
    torch.testing.assert_close(found.lengths_T, jacobian_TP.norm(dim=1))
    unit_TP = torch.nn.functional.normalize(jacobian_TP, dim=1)
    torch.testing.assert_close(found.cosines_TT, unit_TP @ unit_TP.T)
    scalars = found.scalars()
    assert list(scalars) == [
        "gradient_norm/digit",
        "cosine/digit/thickness",
        "cosine/digit/ink",
        "gradient_norm/thickness",
        "cosine/thickness/ink",
        "gradient_norm/ink",
    ]
    assert scalars["cosine/digit/ink"] == pytest.approx(float(unit_TP[0] @ unit_TP[2]))


def test_an_absent_task_is_left_out() -> None:
    gramian_TT = torch.eye(3)
    gramian_TT[1] = gramian_TT[:, 1] = math.nan
    found = diagnose(TASKS, gramian_TT, torch.tensor([True, False, True]))
    assert set(found.scalars()) == {"gradient_norm/digit", "gradient_norm/ink", "cosine/digit/ink"}
    assert found.sentences() == []


def test_tasks_that_conflict_are_named_the_worst_first() -> None:
    gramian_TT = torch.tensor([[1.0, -0.3, -0.9], [-0.3, 1.0, 0.2], [-0.9, 0.2, 1.0]])
    assert diagnose(TASKS, gramian_TT, ALL).sentences() == [
        "digit and ink conflict: the cosine of their gradients is -0.90.",
        "digit and thickness conflict: the cosine of their gradients is -0.30.",
    ]


def test_a_conflict_that_one_task_wins_by_its_length_says_so() -> None:
    gramian_TT = torch.tensor([[1.0, 0.0, -20.0], [0.0, 1.0, 0.0], [-20.0, 0.0, 1600.0]])
    assert diagnose(TASKS, gramian_TT, ALL).sentences() == [
        "digit and ink conflict: the cosine of their gradients is -0.50, "
        "and ink's gradient is 40 times as long: it wins."
    ]


def test_a_gradient_of_length_zero_conflicts_with_none() -> None:
    gramian_TT = torch.diag(torch.tensor([1.0, 0.0, 1.0]))
    found = diagnose(TASKS, gramian_TT, ALL)
    assert found.sentences() == []
    assert found.scalars()["cosine/digit/thickness"] == 0.0
