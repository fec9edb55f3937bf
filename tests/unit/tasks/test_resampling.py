"""A split's metrics can be had again from one row per sample, and so have intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.batch import Batch
from mtl_dist.intervals import intervals
from mtl_dist.sample_rows import SampleRows, Table
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tasks.task import Task
from tests.unit.tasks.test_contract import INFOS, SETTINGS

ALL = INFOS | {
    "two classes": TaskInfo("classification", ("no", "yes"), 10, (7, 3)),
    "grades": TaskInfo("ordinal", ("a", "b", "c", "d"), 10, (4, 3, 2, 1)),
    "depth": TaskInfo("depth", (), 10, mean=3.0, std=1.0, minimum=0.5, maximum=9.0, facts={"positive": 10}),
    "normals": TaskInfo("normals", (), 10, facts={"mean": [0.0, 0.0, 1.0], "pixels": 10}),
}


@dataclass
class Rank:
    """One of several ranks that answer in turn; the first one is asked last and gets what the others sent."""

    is_main: bool
    sent: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        if self.is_main:
            return [value, *self.sent]
        self.sent.append(value)
        return []


def build(which: str) -> Task:
    raw = {"kind": ALL[which].kind}
    return build_tasks({"it": SETTINGS.validate_python(raw)}, {"it": ALL[which]})["it"]


def collect(rows: SampleRows, task: Task, output: Any, target: Any, labelled_B: Any, first: int = 0) -> None:
    num = len(labelled_B)
    positions_B = torch.arange(first, first + num)
    keys = [f"key{n}" for n in positions_B.tolist()]
    everything = torch.ones(num, dtype=torch.bool)
    everything[-1] = False  # only fills the batch
    rows.begin(Batch(torch.zeros(num, 1, 1, 1), {}, {}, everything, positions_B, keys))
    labelled_B = labelled_B & everything
    rows.losses("it", task.sample_losses(output, target, labelled_B))
    rows.answers("it", range(num), output, target, labelled_B.tolist())
    rows.end()


def table_of(which: str) -> tuple[Task, Table, dict[str, float], torch.Tensor]:
    task = build(which)
    example = task.example()
    assert example is not None
    output, target = example
    labelled_B = torch.ones(len(output), dtype=torch.bool)
    labelled_B[[1, 4]] = False
    labelled_B[-1] = False
    metrics = task.metrics()
    metrics.update(output, target, labelled_B)
    rows = SampleRows({"it": task}, Rank(is_main=True), [("photos", 7), ("scans", 100)])  # type: ignore[arg-type]
    collect(rows, task, output, target, labelled_B)
    table = rows.table()
    assert table is not None
    return task, table, metrics.compute(), labelled_B


@pytest.mark.parametrize("which", ALL)
def test_metrics_of_the_rows_are_the_metrics_of_the_split(which: str) -> None:
    task, table, metrics, labelled_B = table_of(which)
    columns = table.of_task("it")
    num = int(labelled_B.sum())
    found = task.resampled(columns, np.ones((2, num)))
    assert task.settings.compared[0] in found
    for name, values in found.items():
        assert values.shape == (2,)
        assert values[0] == pytest.approx(metrics[name], rel=1e-5, nan_ok=True), name


@pytest.mark.parametrize("which", ALL)
def test_weights_count_a_sample_several_times(which: str) -> None:
    task, table, _, labelled_B = table_of(which)
    columns = table.of_task("it")
    drawn = np.random.default_rng(1).integers(0, int(labelled_B.sum()), size=40)
    weights = np.bincount(drawn, minlength=int(labelled_B.sum())).astype(float)[None]
    again = {name: values[drawn] for name, values in columns.items()}
    expected = task.resampled(again, np.ones((1, 40)))
    for name, values in task.resampled(columns, weights).items():
        assert values[0] == pytest.approx(expected[name][0], rel=1e-9, nan_ok=True), name


def test_missing_labels_are_empty_and_every_sample_has_its_answer() -> None:
    _, table, _, labelled_B = table_of("classification")
    rows = list(table.rows())
    assert [row["position"] for row in rows] == list(range(len(labelled_B) - 1))
    assert [row["dataset"] for row in rows] == ["photos"] * 7 + ["scans"] * (len(rows) - 7)
    for row, labelled in zip(rows, labelled_B.tolist(), strict=False):
        assert (row["it.label"] is None) == (not labelled) == (row["it.loss"] is None)
        assert row["it.class_name"] in "abc"
        assert row["it.correct"] == (row["it.class_name"] == row["it.label"] if labelled else None)


def test_the_rows_of_two_ranks_are_those_of_one_in_the_same_order() -> None:
    task, table, _, labelled_B = table_of("classification")
    output, target = task.example() or (None, None)
    assert output is not None
    assert target is not None
    sent: list[Any] = []
    datasets = [("photos", 7), ("scans", 100)]
    second, first = (SampleRows({"it": task}, Rank(main, sent), datasets) for main in (False, True))  # type: ignore[arg-type]
    fill = [*range(6, len(output)), 0]
    collect(second, task, output[fill], target[fill], labelled_B[fill], first=6)
    assert second.table() is None
    collect(first, task, output[[*range(6), 0]], target[[*range(6), 0]], labelled_B[[*range(6), 0]])
    both = first.table()
    assert both is not None
    assert list(both.rows())[: len(table)] == list(table.rows())


def test_an_interval_holds_the_metric_and_is_the_same_every_time() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(40, 12, 300)
    columns = {"label": labels, "error": rng.normal(0, 2, 300)}
    found = intervals(build("regression"), columns, draws=200)
    mae = float(np.abs(columns["error"]).mean())
    low, high = found["mae"]
    assert low < mae < high
    # The standard error of the mean of half-normal numbers: 2 * 0.6 / sqrt(300).
    assert high - low == pytest.approx(4 * 2 * 0.603 / np.sqrt(300), rel=0.25)
    assert intervals(build("regression"), columns, draws=200) == found
    assert intervals(build("regression"), {name: values[:3] for name, values in columns.items()}) == {}
