"""Temperatures make labels likeliest, and change probabilities alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax

from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.multilabel import MultilabelSettings
from mtl_dist.tasks.task import Task
from mtl_dist.tasks.temperature import LARGEST, Scores, calibrated, fitted

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (500, 3))
CLASSES = np.array([RNG.choice(3, p=np.exp(log_softmax(row / 1.7))) for row in LOGITS])
PRESENT = (RNG.random((500, 3)) < expit(LOGITS / 0.6)).astype(np.int64)


def of_classes(temperature: float) -> float:
    return float(-log_softmax(LOGITS / temperature, axis=1)[np.arange(500), CLASSES].mean())


def of_labels(temperature: float) -> float:
    p = expit(LOGITS / temperature)
    return float(-(PRESENT * np.log(p) + (1 - PRESENT) * np.log(1 - p)).mean())


@pytest.mark.parametrize(("loss", "truths", "about"), [(of_classes, CLASSES, 1.7), (of_labels, PRESENT, 0.6)])
def test_the_temperature_is_where_scipy_finds_the_least_negative_log_likelihood(loss, truths, about) -> None:
    scores = Scores(torch.from_numpy(LOGITS), torch.from_numpy(truths))
    expected = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x
    assert fitted(scores) == pytest.approx(expected, rel=1e-5)
    assert fitted(scores) == pytest.approx(about, rel=0.15)
    found = calibrated(scores, None)
    assert found.before["nll"] == pytest.approx(loss(1.0))
    assert found.after["nll"] == pytest.approx(loss(found.temperature))
    assert found.after["nll"] < found.before["nll"]
    assert found.after["ece"] < found.before["ece"]


def test_without_an_optimum_the_temperature_stays_within_bounds_and_without_labels_there_is_none() -> None:
    right = Scores(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    wrong = Scores(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0]))
    assert fitted(right) == pytest.approx(1 / LARGEST, rel=1e-3)
    assert fitted(wrong) == pytest.approx(LARGEST, rel=1e-3)
    nothing = calibrated(Scores(torch.empty(0, 3), torch.empty(0, dtype=torch.long)), None)
    assert math.isnan(nothing.temperature)
    assert all(map(math.isnan, nothing.after.values()))


def tasks() -> dict[str, tuple[Task, torch.Tensor]]:
    two, three = TaskInfo("classification", ("a", "b"), 9), TaskInfo("classification", ("a", "b", "c"), 9)
    return {
        "two": (ClassificationSettings(threshold=0.3).build("it", two), torch.from_numpy(CLASSES % 2)),
        "three": (ClassificationSettings().build("it", three), torch.from_numpy(CLASSES)),
        "tags": (
            MultilabelSettings(threshold=0.3).build("it", TaskInfo("multilabel", ("a", "b", "c"), 9)),
            torch.from_numpy(PRESENT).float(),
        ),
    }


@pytest.mark.parametrize("name", ["two", "three", "tags"])
def test_metrics_measure_at_a_temperature_what_they_measure_without_it(name: str) -> None:
    task, target = tasks()[name]
    output = torch.from_numpy(LOGITS).float()[:, : task.head.num_outputs]
    labelled = torch.arange(500) % 5 != 0
    metrics = task.metrics()
    metrics.calibrate(None)  # type: ignore[attr-defined]
    for part in zip(output.split(99), target.split(99), labelled.split(99), strict=True):
        metrics.update(*part)
    values = metrics.compute()
    found = metrics.calibrated()  # type: ignore[attr-defined]
    assert found.before["ece"] == pytest.approx(values["ece"], rel=1e-4)
    assert found.before["brier"] == pytest.approx(values["brier"], rel=1e-5)
    scaled = task.metrics()
    scaled.update(output / found.temperature, target, labelled)
    again = scaled.compute()
    assert found.after["ece"] == pytest.approx(again["ece"], rel=1e-3)
    assert found.after["brier"] == pytest.approx(again["brier"], rel=1e-5)
    later = task.metrics()
    later.calibrate(found.temperature)  # type: ignore[attr-defined]
    later.update(output, target, labelled)
    assert later.calibrated().after == pytest.approx(found.after)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["two", "three", "tags"])
def test_a_temperature_changes_probabilities_and_no_decision_but_by_a_threshold_of_the_users(
    name: str,
) -> None:

    task, _ = tasks()[name]
    output = torch.from_numpy(LOGITS).float()[:, : task.head.num_outputs]
    warm = replace(task, temperature=2.0)
    decided = "labels" if name == "tags" else "class_id"
    for cold_one, warm_one, scaled in zip(
        task.decode(output), warm.decode(output), task.decode(output / 2), strict=True
    ):
        assert warm_one[decided] == cold_one[decided]
        assert warm_one["probabilities"] == pytest.approx(scaled["probabilities"])
    if name != "three":
        assert [a[decided] for a in warm.decode(output, 0.7)] == [
            a[decided] for a in task.decode(output / 2, 0.7)
        ]
