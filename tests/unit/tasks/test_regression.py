"""Quantiles, predicted deviations and logarithms of numbers, against numpy and scipy in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from mtl_dist.assemble import check_numbers
from mtl_dist.errors import UserError
from mtl_dist.kinds.regression import Regression
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.regression import GaussianTask, QuantileTask, RegressionSettings, RegressionTask

LABELS = np.random.default_rng(0).lognormal(3, 0.7, 400).astype(np.float32)
INFO = Regression().facts(LABELS.astype(np.float64), TaskInfo("regression", num_labelled=400, unit="mm"))
SHARES = (0.1, 0.5, 0.8)
SPACES = ("linear", "log")


def task_of(space: str = "linear", info: TaskInfo = INFO, **stated: Any) -> RegressionTask:
    task = RegressionSettings.model_validate({"space": space, **stated}).build("size", info)
    assert isinstance(task, RegressionTask)
    return task


def outputs(task: RegressionTask, num: int = 400) -> torch.Tensor:
    return torch.randn(num, task.head.num_outputs, generator=torch.Generator().manual_seed(1))


def measured(task: RegressionTask, labelled: np.ndarray) -> tuple[dict[str, float], list[dict[str, float]]]:
    metrics = task.metrics()
    for part in np.array_split(np.arange(400), 7):
        metrics.update(outputs(task)[part], torch.from_numpy(LABELS)[part], torch.from_numpy(labelled[part]))
    return metrics.compute(), metrics.per_class()  # type: ignore[attr-defined]


def learnt(values: np.ndarray, space: str) -> np.ndarray:
    return np.log(values) if space == "log" else values


def moments(space: str) -> tuple[float, float]:
    values = learnt(LABELS.astype(np.float64), space)
    return float(values.mean()), float(values.std())


@pytest.mark.parametrize("space", SPACES)
def test_the_pinball_loss_is_numpys_and_its_metrics_are_in_the_unit(space: str) -> None:
    task = task_of(space, loss={"kind": "quantile", "quantiles": SHARES})
    assert isinstance(task, QuantileTask)
    mean, std = moments(space)
    raw, target = outputs(task).double().numpy(), LABELS.astype(np.float64)
    scaled = (learnt(target, space) - mean) / std
    errors, shares = scaled[:, None] - raw, np.array(SHARES)
    every = torch.ones(400, dtype=torch.bool)
    total = task.loss_sum(outputs(task), torch.from_numpy(LABELS), every)
    expected = np.where(errors > 0, shares * errors, (shares - 1) * errors).mean(axis=1).sum()
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(task.count(torch.from_numpy(LABELS), every)) == 400

    labelled = np.arange(400) % 3 != 0
    values, per_quantile = measured(task, labelled)
    quantiles = np.sort(raw, axis=1) * std + mean
    quantiles = (np.exp(quantiles) if space == "log" else quantiles)[labelled]
    target = target[labelled]
    errors = target[:, None] - quantiles
    pinballs = np.where(errors > 0, shares * errors, (shares - 1) * errors)
    covered = ((target >= quantiles[:, 0]) & (target <= quantiles[:, -1])).mean()
    assert values == pytest.approx(
        {
            "mae": np.abs(errors[:, 1]).mean(),
            "rmse": math.sqrt((errors[:, 1] ** 2).mean()),
            "mse": (errors[:, 1] ** 2).mean(),
            "r2": 1 - (errors[:, 1] ** 2).sum() / ((target - target.mean()) ** 2).sum(),
            "pinball": pinballs.mean(),
            "coverage": covered,
            "coverage_error": abs(covered - 0.7),
            "interval_width": (quantiles[:, -1] - quantiles[:, 0]).mean(),
            "num_samples": labelled.sum(),
        },
        rel=1e-6,
    )
    assert [row["pinball"] for row in per_quantile] == pytest.approx(pinballs.mean(axis=0), rel=1e-6)
    assert [row["below"] for row in per_quantile] == pytest.approx((errors < 0).mean(axis=0))
    assert task.parts == ("0.1", "0.5", "0.8")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_likelihood_is_scipys_and_its_metrics_are_in_the_unit(space: str, beta: float) -> None:
    task = task_of(space, loss={"kind": "gaussian_nll", "beta": beta})
    assert isinstance(task, GaussianTask)
    mean, std = moments(space)
    raw, target = outputs(task).double().numpy(), LABELS.astype(np.float64)
    deviations = 1e-3 + np.log1p(np.exp(raw[:, 1]))
    scaled = (learnt(target, space) - mean) / std
    every = torch.ones(400, dtype=torch.bool)
    total = task.loss_sum(outputs(task), torch.from_numpy(LABELS), every)
    smallest = -stats.norm.logpdf(0, 0, 1e-3)
    losses = (-stats.norm.logpdf(scaled, raw[:, 0], deviations) - smallest) * deviations ** (2 * beta)
    assert (losses >= 0).all()
    assert float(total) == pytest.approx(losses.sum(), rel=1e-5)

    labelled = np.arange(400) % 3 != 0
    values, _ = measured(task, labelled)
    middle, apart = raw[:, 0] * std + mean, deviations * std
    if space == "log":
        found = stats.lognorm(apart, scale=np.exp(middle))
        answers = np.exp(middle)
    else:
        found = stats.norm(middle, apart)
        answers = middle
    low, high = found.interval(0.95)
    covered = ((target >= low) & (target <= high))[labelled].mean()
    assert values["mae"] == pytest.approx(np.abs(answers - target)[labelled].mean(), rel=1e-6)
    assert values["nll"] == pytest.approx(-found.logpdf(target)[labelled].mean(), rel=1e-6)
    assert values["coverage"] == pytest.approx(covered)
    assert values["coverage_error"] == pytest.approx(abs(covered - 0.95))
    assert values["mean_deviation"] == pytest.approx(found.std()[labelled].mean(), rel=1e-6)
    for answer, value, deviation in zip(task.decode(outputs(task)), answers, found.std(), strict=True):
        assert answer == {
            "value": pytest.approx(value, rel=1e-6),
            "deviation": pytest.approx(deviation, rel=1e-6),
            "unit": "mm",
        }


@pytest.mark.parametrize("loss", [{"kind": "quantile", "quantiles": SHARES}, {"kind": "gaussian_nll"}])
@pytest.mark.parametrize("space", SPACES)
def test_metrics_are_the_same_to_the_bit_in_whatever_parts_they_are_counted(loss: Any, space: str) -> None:
    task = task_of(space, loss=loss)
    whole, parts = task.metrics(), task.metrics()
    target, every = torch.from_numpy(LABELS), torch.ones(400, dtype=torch.bool)
    whole.update(outputs(task), target, every)
    for at in range(399, -1, -1):
        parts.update(outputs(task)[at : at + 1], target[at : at + 1], every[:1])
    own = set(task.reported) - {"mae", "rmse", "mse", "r2"}
    expected = whole.compute()
    assert {name: value for name, value in parts.compute().items() if name in own} == {
        name: expected[name] for name in own
    }


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["mse", "quantile", "gaussian_nll"])
def test_the_constant_answer_is_that_of_the_training_labels(kind: str, space: str) -> None:
    task = task_of(space, loss={"kind": kind})
    baseline = task.baseline()
    assert baseline is not None
    assert baseline.name == ("geometric mean" if space == "log" else "mean")
    (answer,) = task.decode(baseline.output_C[None])
    mean, std = moments(space)
    assert answer["value"] == pytest.approx(stats.gmean(LABELS) if space == "log" else mean, rel=1e-5)
    if kind == "quantile":
        expected = stats.norm(mean, std).ppf([0.05, 0.5, 0.95])
        expected = np.exp(expected) if space == "log" else expected
        assert list(answer["quantiles"].values()) == pytest.approx(expected, rel=1e-5)
    if kind == "gaussian_nll":
        found = stats.lognorm(std, scale=math.exp(mean)).std() if space == "log" else std
        assert answer["deviation"] == pytest.approx(found, rel=1e-5)


def test_quantiles_that_cross_are_put_in_order_where_they_are_read() -> None:
    task = task_of(loss={"kind": "quantile"}, standardise=False)
    (answer,) = task.decode(torch.tensor([[3.0, 1.0, 2.0]]))
    assert answer == {"value": 2.0, "unit": "mm", "quantiles": {"0.05": 1.0, "0.5": 2.0, "0.95": 3.0}}


def test_a_likelihood_is_finite_with_finite_gradients_where_outputs_and_labels_are_far() -> None:
    task = task_of(loss={"kind": "gaussian_nll"})
    for far in (-6e4, 6e4):
        rough = torch.full((4, 2), far, dtype=torch.float16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            total = task.loss_sum(rough, torch.tensor(LABELS[:4]), torch.ones(4, dtype=torch.bool))
        total.backward()
        assert total.dtype == torch.float32
        assert total.isfinite()
        (again,) = torch.autograd.grad(
            task.loss_sum(
                wide := rough.detach().float().requires_grad_(),
                torch.tensor(LABELS[:4]),
                torch.ones(4, dtype=torch.bool),
            ),
            wide,
        )
        assert again.isfinite().all()
    deviations = task.loss.deviations(torch.tensor([[0.0, -1e4]]))  # type: ignore[attr-defined]
    assert float(deviations) == pytest.approx(1e-3)


@pytest.mark.parametrize("quantiles", [(0.5, 0.1), (0.1, 0.9), (0.5, 0.5), (0.0, 0.5), ()])
def test_quantiles_are_ascending_shares_with_the_median(quantiles: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        RegressionSettings.model_validate({"loss": {"kind": "quantile", "quantiles": quantiles}})


def test_one_quantile_has_no_interval() -> None:
    task = task_of(loss={"kind": "quantile", "quantiles": (0.5,)})
    assert list(task.metrics().compute()) == [*task.reported, "num_samples"]
    assert "interval_width" not in task.reported


def test_logarithms_want_positive_labels() -> None:
    with pytest.raises(UserError, match=r"tasks\.size\.space: expected positive labels for log, found -1"):
        task_of("log", replace(INFO, minimum=-1.0))
    with pytest.raises(UserError, match="found one that was prepared without"):
        task_of("log", replace(INFO, facts={}))
    task = task_of("log")
    metrics = task.metrics()
    metrics.update(torch.zeros(3, 1), torch.tensor([1.0, 0.0, -2.0]), torch.tensor([True, True, False]))
    with pytest.raises(UserError, match="found 1 of 2 that are not"):
        metrics.compute()


def test_moments_of_logarithms_are_pooled_and_only_where_all_labels_are_positive() -> None:
    kind, blank = Regression(), TaskInfo("regression")
    halves = [
        replace(kind.facts(half.astype(np.float64), blank), num_labelled=200) for half in np.split(LABELS, 2)
    ]
    merged = kind.merge(halves)
    assert merged.facts == pytest.approx(dict(INFO.facts), rel=1e-9)
    assert (merged.mean, merged.std) == pytest.approx((INFO.mean, INFO.std))
    negative = replace(kind.facts(np.array([-1.0, 2.0]), blank), num_labelled=2)
    assert negative.facts == {}
    assert kind.merge([halves[0], negative]).facts == {}
    assert kind.merge([negative, halves[0]]).facts == {}


@pytest.mark.parametrize("loss", [{"kind": "quantile", "quantiles": SHARES}, {"kind": "gaussian_nll"}])
@pytest.mark.parametrize("space", SPACES)
def test_metrics_of_the_rows_are_those_of_the_split(loss: Any, space: str) -> None:
    task = task_of(space, loss=loss)
    every = np.ones(400, dtype=bool)
    values, _ = measured(task, every)
    answers = task.decode(outputs(task))
    judged = [
        task.judged(answer, outputs(task)[at : at + 1], torch.from_numpy(LABELS)[at : at + 1])
        for at, answer in enumerate(answers)
    ]
    rows = [
        a | j | {f"quantiles.{share}": value for share, value in a.get("quantiles", {}).items()}
        for a, j in zip(answers, judged, strict=True)
    ]
    names = [name for name in rows[0] if name not in ("unit", "quantiles")]
    columns = {name: np.array([row[name] for row in rows]) for name in names}
    found = task.resampled(columns, np.ones((1, 400)))
    assert set(found) == set(values) - {"coverage_error", "num_samples"}
    for name, (value,) in found.items():
        assert value == pytest.approx(values[name], rel=1e-6), name


def test_labels_of_any_split_that_have_no_logarithm_are_refused_before_training() -> None:
    def split(*values: float) -> Any:
        column = np.array([(value,) for value in values], [("age", "<f8")])
        return (SimpleNamespace(reader=SimpleNamespace(label_columns=lambda: column)),)

    data: Any = SimpleNamespace(sources={"train": split(1, 2), "val": split(3, math.nan, -1, 0)})
    root: Any = SimpleNamespace(tasks={"age": task_of("log")})
    with pytest.raises(UserError, match=r"age\.space: .*found -1 in val \(2 labels\)"):
        check_numbers(data, root)
    root.tasks["age"] = task_of()
    check_numbers(data, root)
