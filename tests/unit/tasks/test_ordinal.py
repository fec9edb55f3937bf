"""Grades: two losses whose outputs are probabilities in order, metrics in steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtl_dist.errors import UserError
from mtl_dist.kinds.cells import parse_cells
from mtl_dist.kinds.ordinal import Ordinal
from mtl_dist.kinds.vocabulary import Declared
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.ordinal import OrdinalSettings, OrdinalTask

INFO = TaskInfo("ordinal", ("none", "mild", "clear", "severe"), 40, (10, 5, 20, 5))
LOSSES = ("corn", "cumulative_link")


def task_of(loss: str) -> OrdinalTask:
    task = OrdinalSettings.model_validate({"loss": {"kind": loss}}).build("grade", INFO)
    assert isinstance(task, OrdinalTask)
    return task


def outputs(num: int = 50) -> torch.Tensor:
    return 3 * torch.randn(num, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_probabilities_are_in_order_and_sum_to_one(loss: str) -> None:
    task = task_of(loss)
    beyond = task.loss.beyond(outputs())
    assert (beyond[:, 1:] <= beyond[:, :-1]).all()
    for answer in task.decode(outputs()):
        shares = list(answer["probabilities"].values())
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        assert sum(shares[: answer["class_id"]]) < 0.5 + 1e-9
        assert answer["class_name"] == INFO.classes[answer["class_id"]]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_likelihood_of_the_grades(loss: str) -> None:
    """CORN's questions multiply to the grade's probability, so their cross entropies add to its logarithm."""
    task = task_of(loss)
    target = torch.arange(50) % 4
    probabilities = torch.tensor([list(a["probabilities"].values()) for a in task.decode(outputs())])
    expected = -probabilities.double().gather(1, target[:, None])[:, 0].log()
    torch.testing.assert_close(
        task.loss.numerators(outputs(), target).double(), expected, rtol=1e-4, atol=1e-4
    )
    counts = task.loss.denominators(target)
    assert counts[:4].tolist() == ([1, 2, 3, 3] if loss == "corn" else [1, 1, 1, 1])


@pytest.mark.parametrize("loss", LOSSES)
def test_far_outputs_have_finite_losses_and_gradients(loss: str) -> None:
    for scale in (1e-3, 80.0, 1e4):
        output = (scale * outputs()).requires_grad_()
        total = task_of(loss).loss_sum(output, torch.arange(50) % 4, torch.ones(50, dtype=torch.bool))
        total.backward()
        assert torch.isfinite(total) and output.grad is not None and torch.isfinite(output.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_baseline_says_the_shares_of_the_training_labels(loss: str) -> None:
    baseline = task_of(loss).baseline()
    assert baseline is not None
    shares = task_of(loss).decode(baseline.output_C[None])[0]["probabilities"]
    assert list(shares.values()) == pytest.approx([0.25, 0.125, 0.5, 0.125], abs=1e-4)


def test_metrics_are_those_of_numpy() -> None:
    task = task_of("corn")
    target = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    labelled = torch.arange(50) % 5 != 0
    metrics = task.metrics()
    metrics.update(outputs()[:30], target[:30], labelled[:30])
    metrics.update(outputs()[30:], target[30:], labelled[30:])
    found = np.array([answer["class_id"] for answer in task.decode(outputs())])[labelled.numpy()]
    true = target.numpy()[labelled.numpy()]
    apart = np.abs(found - true)
    chance = np.mean([(a - b) ** 2 for a in found for b in true])
    assert metrics.compute() == pytest.approx(
        {
            "mae": apart.mean(),
            "kappa": 1 - (apart**2).mean() / chance,
            "within_one": (apart <= 1).mean(),
            "accuracy": (apart == 0).mean(),
            "num_samples": 40.0,
        },
        rel=1e-9,
    )
    matrix = metrics.confusion_matrix()
    assert matrix is not None and matrix.sum() == 40


def test_without_a_label_nothing_is_defined() -> None:
    values = task_of("corn").metrics().compute()
    assert values.pop("num_samples") == 0 and all(math.isnan(value) for value in values.values())


def test_grades_without_names_are_numbers() -> None:
    parsed = parse_cells(Ordinal(), ["10", "2", "", "0"], str, Declared())
    assert (parsed.classes, list(parsed.labels)) == (("0", "2", "10"), [2, 1, None, 0])
    parsed = parse_cells(Ordinal(), ["mild", "none"], str, Declared(("none", "mild")))
    assert (parsed.classes, list(parsed.labels)) == (("none", "mild"), [1, 0])
    with pytest.raises(UserError, match="expected a whole number as grade, found 'mild'"):
        parse_cells(Ordinal(), ["mild", "none"], str, Declared())
