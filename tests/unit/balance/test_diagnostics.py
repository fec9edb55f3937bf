"""What is read off a Gramian for people."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_dist.balance.diagnostics import diagnose
from mtl_dist.balance.evidence import LOOKS, ConflictWatch

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


def sentences(looks: int, *gramians: torch.Tensor) -> list[str]:
    watch = ConflictWatch()
    return [
        sentence
        for _ in range(looks)
        for gramian_TT in gramians
        for sentence in watch.look(diagnose(TASKS, gramian_TT, ALL))
    ]


def test_tasks_that_conflict_are_named_once_and_after_enough_looks() -> None:
    gramian_TT = torch.tensor([[1.0, -0.3, -0.05], [-0.3, 1.0, 0.2], [-0.05, 0.2, 1.0]])
    assert sentences(LOOKS - 1, gramian_TT) == []
    assert sentences(3 * LOOKS, gramian_TT) == [
        "digit and thickness conflict: the mean cosine of their gradients is -0.30 (standard error 0.00), "
        "below -0.1 in 5 of 5 comparisons."
    ]


def test_gradients_that_now_conflict_and_now_agree_are_no_evidence() -> None:
    against, along = torch.eye(3), torch.eye(3)
    against[0, 1] = against[1, 0] = -0.9
    along[0, 1] = along[1, 0] = 0.5
    assert sentences(10, against, along) == []


def test_a_conflict_that_one_task_wins_by_its_length_says_so() -> None:
    gramian_TT = torch.tensor([[1.0, 0.0, -20.0], [0.0, 1.0, 0.0], [-20.0, 0.0, 1600.0]])
    (sentence,) = sentences(LOOKS, gramian_TT)
    assert sentence.startswith("digit and ink conflict: the mean cosine of their gradients is -0.50")
    assert sentence.endswith("and ink's gradient is 40 times as long: it wins.")


def test_a_gradient_of_length_zero_conflicts_with_none() -> None:
    gramian_TT = torch.diag(torch.tensor([1.0, 0.0, 1.0]))
    assert diagnose(TASKS, gramian_TT, ALL).scalars()["cosine/digit/thickness"] == 0.0
    assert sentences(LOOKS, gramian_TT) == []
