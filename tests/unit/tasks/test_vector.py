"""Several numbers with names are learnt: each by itself, missing ones left out, metrics those of numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.batch import Batch
from mtl_dist.kinds.vector import Vector
from mtl_dist.sample_rows import SampleRows
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.number_losses import L1, Huber, Mse, PointLoss, SmoothL1
from mtl_dist.tasks.vector import VectorSettings, VectorTask
from tests.unit.tasks.test_resampling import Rank

NAMES = ("dx", "dy", "turn")
RNG = np.random.default_rng(0)
LABELS = RNG.normal([1, 200, -3], [1, 50, 0.1], (60, 3)).astype(np.float32)
LABELS[RNG.random((60, 3)) < 0.3] = np.nan
LABELLED = np.isfinite(LABELS).any(axis=1)
INFO = Vector().facts(
    LABELS.astype(np.float64), TaskInfo("vector", NAMES, num_labelled=int(LABELLED.sum()), unit="px,px,deg")
)
MEAN, STD = np.nanmean(LABELS.astype(float), axis=0), np.nanstd(LABELS.astype(float), axis=0)
OUTPUT = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
TARGET, GIVEN = torch.from_numpy(LABELS), torch.from_numpy(LABELLED)


def task_of(**stated: Any) -> VectorTask:
    task = VectorSettings.model_validate(stated).build("pose", INFO)
    assert isinstance(task, VectorTask)
    return task


@pytest.mark.parametrize(
    ("kind", "loss"), {"mse": Mse(), "l1": L1(), "smooth_l1": SmoothL1(1.0), "huber": Huber(1.0)}.items()
)
def test_the_loss_is_the_mean_over_all_numbers_that_have_a_label(kind: str, loss: PointLoss) -> None:
    task = task_of(loss={"kind": kind})
    there = np.isfinite(LABELS)
    errors = (OUTPUT.double().numpy() - (LABELS - MEAN) / STD)[there]
    expected = {
        "mse": errors**2,
        "l1": np.abs(errors),
        "smooth_l1": np.where(np.abs(errors) < 1, errors**2 / 2, np.abs(errors) - 0.5),
        "huber": np.where(np.abs(errors) < 1, errors**2 / 2, np.abs(errors) - 0.5),
    }[kind].sum()
    assert float(task.loss_sum(OUTPUT, TARGET, GIVEN)) == pytest.approx(expected, rel=1e-5)
    assert int(task.count(TARGET, GIVEN)) == there.sum()
    parts = zip(OUTPUT.split(7), TARGET.split(7), GIVEN.split(7), strict=True)
    assert sum(float(task.loss_sum(*part)) for part in parts) == pytest.approx(expected, rel=1e-5)


def test_a_missing_number_changes_neither_value_nor_gradient_whatever_its_output() -> None:
    task = task_of()
    output = torch.where(torch.isfinite(TARGET), OUTPUT, math.nan).requires_grad_()
    total = task.loss_sum(output, TARGET, GIVEN)
    total.backward()
    assert total.item() == pytest.approx(float(task.loss_sum(OUTPUT, TARGET, GIVEN)))
    assert output.grad is not None
    assert torch.equal(output.grad != 0, torch.isfinite(TARGET))
    nothing = torch.zeros(60, dtype=torch.bool)
    assert task.loss_sum(OUTPUT, TARGET, nothing) == 0
    assert task.count(TARGET, nothing) == 0


def measured(task: VectorTask) -> tuple[dict[str, float], list[dict[str, float]]]:
    metrics = task.metrics()
    for part in zip(OUTPUT.split(7), TARGET.split(7), GIVEN.split(7), strict=True):
        metrics.update(*part)
    return metrics.compute(), metrics.per_class()  # type: ignore[attr-defined]


def test_metrics_are_numpys_of_each_number_and_their_means() -> None:
    values, per_number = measured(task_of())
    for at, found in enumerate(per_number):
        there = np.isfinite(LABELS[:, at])
        true = LABELS[there, at].astype(float)
        errors = OUTPUT.double().numpy()[there, at] * STD[at] + MEAN[at] - true
        rmse = math.sqrt((errors**2).mean())
        assert found == pytest.approx(
            {
                "nrmse": rmse / STD[at],
                "mae": np.abs(errors).mean(),
                "rmse": rmse,
                "r2": 1 - (errors**2).sum() / ((true - true.mean()) ** 2).sum(),
                "support": there.sum(),
            },
            rel=1e-6,
        )
    expected = {name: np.mean([row[name] for row in per_number]) for name in ("nrmse", "mae", "rmse", "r2")}
    assert values == pytest.approx(expected | {"num_samples": LABELLED.sum()})
    assert task_of().parts == NAMES


def test_answers_have_names_and_units_and_the_baseline_says_the_means() -> None:
    for standardise in (True, False):
        task = task_of(standardise=standardise)
        baseline = task.baseline()
        assert baseline is not None
        (answer,) = task.decode(baseline.output_C[None])
        assert list(answer["values"]) == list(NAMES)
        assert list(answer["values"].values()) == pytest.approx(MEAN.tolist(), rel=1e-5)
        assert answer["units"] == {"dx": "px", "dy": "px", "turn": "deg"}
    task = VectorSettings().build("it", TaskInfo("vector", NAMES, unit="m", facts=INFO.facts))
    assert task.decode(torch.zeros(1, 3))[0]["unit"] == "m"


def test_metrics_of_the_rows_are_those_of_the_split() -> None:
    task = task_of()
    values, _ = measured(task)
    rows = SampleRows({"pose": task}, Rank(is_main=True), [("poses", 60)])  # type: ignore[arg-type]
    everything = torch.ones(60, dtype=torch.bool)
    rows.begin(
        Batch(torch.zeros(60, 1, 1, 1), {}, {}, everything, torch.arange(60), list(map(str, range(60))))
    )
    rows.losses("pose", task.sample_losses(OUTPUT, TARGET, GIVEN))
    rows.answers("pose", range(60), OUTPUT, TARGET, LABELLED.tolist())
    rows.end()
    table = rows.table()
    assert table is not None
    columns = table.of_task("pose")
    assert {f"{key}.{name}" for key in ("values", "label", "error") for name in NAMES} | {"off"} <= set(
        columns
    )
    assert not [name for name in columns if name.startswith("unit")]
    found = task.resampled(columns, np.ones((2, int(LABELLED.sum()))))
    assert {name: row[0] for name, row in found.items()} == pytest.approx(
        {name: values[name] for name in ("mae", "rmse", "r2", "nrmse")}, rel=1e-6
    )
