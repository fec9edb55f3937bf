"""What a page of a run says and draws, without a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from mtl_dist.report.page.charts import confusion_figure
from mtl_dist.report.page.record import RunRecord


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
