"""The monitor finds the best evaluation, the plateau and the end of patience."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from mtl_dist.monitor import Monitor, MonitorSettings
from mtl_dist.optim import ConstantSchedule, PlateauSchedule


def test_the_best_is_the_largest_or_the_smallest_as_the_mode_says() -> None:
    up = Monitor(MonitorSettings(), "max", ConstantSchedule())
    assert [up.observe(value) for value in (0.5, 0.4, 0.6)] == [True, False, True]
    down = Monitor(MonitorSettings(), "min", ConstantSchedule())
    assert [down.observe(value) for value in (0.5, 0.4, 0.6)] == [True, True, False]
    assert down.state.best == 0.4


def test_a_change_below_min_delta_is_no_improvement() -> None:
    monitor = Monitor(MonitorSettings(min_delta=0.1), "min", ConstantSchedule())
    assert monitor.observe(1.0)
    assert not monitor.observe(0.95)
    assert monitor.observe(0.85)


def test_an_undefined_value_is_never_the_best() -> None:
    monitor = Monitor(MonitorSettings(), "max", ConstantSchedule())
    assert not monitor.observe(math.nan)
    assert monitor.observe(0.1)


def test_patience_counts_evaluations_without_improvement() -> None:
    monitor = Monitor(MonitorSettings(patience=2), "min", ConstantSchedule())
    for value in (1.0, 1.1, 0.9, 1.0):
        monitor.observe(value)
        assert not monitor.exhausted
    monitor.observe(1.0)
    assert monitor.exhausted


def test_a_plateau_lowers_the_factor_down_to_its_minimum() -> None:
    schedule = PlateauSchedule(gamma=0.1, patience=1, minimum=0.05)
    monitor = Monitor(MonitorSettings(), "min", schedule)
    factors = []
    for value in (1.0, 1.0, 1.0, 1.0, 1.0):
        monitor.observe(value)
        factors.append(monitor.state.plateau_factor)
    assert factors == [1.0, 1.0, 0.1, 0.1, 0.05]


def test_a_restored_monitor_goes_on_where_it_was() -> None:
    schedule = PlateauSchedule(patience=0)
    first = Monitor(MonitorSettings(patience=5), "min", schedule)
    for value in (1.0, 2.0, 3.0):
        first.observe(value)
    second = Monitor(MonitorSettings(patience=5), "min", schedule)
    second.load_state_dict(first.state_dict())
    for monitor in (first, second):
        monitor.observe(2.5)
    assert second.state == first.state


def test_a_weighted_mean_is_of_all_its_metrics_or_of_none() -> None:
    settings = MonitorSettings(mean={"val/digit/accuracy": 2.0, "train/size/accuracy": 1.0})
    monitor = Monitor(settings, "max", ConstantSchedule())
    metrics = {"val/digit/accuracy": 0.9, "train/size/accuracy": 0.3, "val/loss": 1.0}
    assert monitor.of(metrics) == {"val/weighted_mean": pytest.approx(0.7)}
    assert monitor.of({"val/digit/accuracy": 0.9}) == {}
    assert monitor.metric == "val/weighted_mean"


def test_the_best_of_each_task_is_followed_on_its_own() -> None:
    modes: dict[str, Literal["min", "max"]] = {"val/digit/accuracy": "max", "val/age/mae": "min"}
    monitor = Monitor(MonitorSettings(per_task=True), "min", ConstantSchedule(), modes)
    monitor.observe_tasks(1, {"val/digit/accuracy": 0.5, "val/age/mae": 3.0})
    monitor.observe_tasks(2, {"val/digit/accuracy": 0.4, "val/age/mae": 2.0})
    monitor.observe_tasks(3, {"val/digit/accuracy": math.nan})
    found = {task: (best["step"], best["value"]) for task, best in monitor.state.task_bests.items()}
    assert found == {"digit": (1, 0.5), "age": (2, 2.0)}
    again = Monitor(MonitorSettings(per_task=True), "min", ConstantSchedule(), modes)
    again.load_state_dict(monitor.state_dict())
    assert again.state == monitor.state
