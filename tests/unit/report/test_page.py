"""What a page of a run says and draws, without a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mtl_dist.report.page.charts import calibration_figures, confusion_figure, parts_listing, unit_of
from mtl_dist.report.page.record import RunRecord
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.class_metrics import binned
from mtl_dist.tasks.registry import TASKS


@dataclass
class Begun:
    """What of a run says whether it went on."""

    starts: list[dict[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)


@pytest.mark.parametrize(("time", "went_on"), [(1767225600.0, True), (1767229300.0, False)])
def test_a_start_went_on_where_rows_are_older_than_it_alone(time: float, went_on: bool) -> None:
    begun = Begun([{"started": "2026-01-01T00:00:00+0000"}, {"started": "2026-01-01T01:00:00+0000"}])
    begun.rows = [{"time": time, "step": 1}]
    assert RunRecord.went_on.fget(cast(RunRecord, begun)) is went_on  # type: ignore[attr-defined]


def test_a_confusion_matrix_of_many_classes_is_of_bounded_size_and_says_what_it_leaves_out() -> None:
    rng = np.random.default_rng(0)
    classes = [f"class number {number}" for number in range(200)]
    figure = confusion_figure(rng.integers(1, 9, (200, 200)).astype(np.float64), classes, False)
    assert len(figure.svg) < 1_000_000
    assert "60 classes with the most confusions, of 200" in figure.caption


def test_the_calibration_error_beside_the_chart_is_the_metric() -> None:
    rng = np.random.default_rng(0)
    says_N, right_N = rng.uniform(0.3, 1, 500), rng.uniform(size=500) < 0.6
    sums_2M = binned(torch.from_numpy(says_N), torch.from_numpy(right_N), torch.ones(500, dtype=torch.bool))
    columns = {"class_id": np.zeros(500), "confidence": says_N, "correct": right_N}
    (figure,) = calibration_figures(columns, np.empty(0), np.empty(0))
    assert f"error {float((sums_2M[0] - sums_2M[1]).abs().sum()) / 500:.3f};" in figure.caption


def test_each_point_has_its_row_and_a_metric_that_it_has_not_is_a_dash() -> None:
    info = TaskInfo("keypoints", ("eye", "nose"), 9, (9, 9))
    task = TASKS["keypoints"].model_validate({"kind": "keypoints"}).build("face", info)
    rows = {"eye": {"support": 1234.0, "nme": 0.25, "pck": None}, "nose": {"support": 5.0, "nme": 0.5}}
    listing = parts_listing(task, rows)
    assert listing.head == ("point", "NME", "PCK", "support")
    assert listing.rows == [("eye", "0.25", "–", "1,234"), ("nose", "0.5", "–", "5")]


@pytest.mark.parametrize(
    ("kind", "metric", "unit"), [("depth", "mae", " m"), ("depth", "r2", ""), ("normals", "mean_angle", "°")]
)
def test_a_number_with_a_unit_says_it(kind: str, metric: str, unit: str) -> None:
    info = TaskInfo(kind, num_labelled=9)
    if kind == "depth":
        info = replace(info, mean=2.0, std=1.0, minimum=1.0, maximum=9.0, unit="m")
    task = TASKS[kind].model_validate({"kind": kind}).build("map", info)
    assert unit_of(task, metric) == unit
