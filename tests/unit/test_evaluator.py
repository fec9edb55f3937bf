"""`val/mean_accuracy`: the mean over the tasks that have an accuracy, to monitor."""

from __future__ import annotations

import pytest

from mtl_dist.errors import UserError
from mtl_dist.evaluator import Evaluation
from mtl_dist.recipe import Recipe


def evaluation(**tasks: dict[str, float]) -> Evaluation:
    return Evaluation(loss=1.0, tasks=tasks, confusion={}, num_samples=4)


def test_it_is_the_mean_over_the_tasks_that_have_an_accuracy() -> None:
    metrics = evaluation(
        digit={"accuracy": 0.9, "f1": 0.1}, parity={"accuracy": 0.7}, age={"mae": 2.0}, unlabelled={}
    ).flat("val")
    assert metrics["val/mean_accuracy"] == pytest.approx(0.8)


def test_it_is_absent_where_no_task_has_one() -> None:
    assert "val/mean_accuracy" not in evaluation(age={"mae": 2.0}).flat("val")


def test_it_can_be_monitored_and_is_to_grow() -> None:
    stated = {
        "tasks": {"digit": {"kind": "classification"}, "age": {"kind": "regression"}},
        "data": {"train": [{"path": "data/x"}], "image_size": 8},
        "monitor": {"metric": "val/mean_accuracy"},
    }
    recipe = Recipe.model_validate(stated, strict=False)
    assert recipe.monitor_mode == "max"


def test_it_cannot_be_monitored_where_no_task_has_an_accuracy() -> None:
    stated = {
        "tasks": {"age": {"kind": "regression"}},
        "data": {"train": [{"path": "data/x"}], "image_size": 8},
        "monitor": {"metric": "val/mean_accuracy"},
    }
    with pytest.raises((UserError, ValueError), match=r"monitor.metric: expected a metric of"):
        Recipe.model_validate(stated, strict=False)


def recipe_that_follows(**monitor: object) -> Recipe:
    stated = {
        "tasks": {"digit": {"kind": "classification"}, "age": {"kind": "regression"}},
        "data": {"train": [{"path": "data/x"}], "image_size": 8},
        "monitor": monitor,
    }
    return Recipe.model_validate(stated, strict=False)


def test_a_mean_is_of_metrics_that_all_grow_or_all_fall() -> None:
    recipe = recipe_that_follows(mean={"val/digit/accuracy": 2, "train/digit/macro_f1": 1})
    assert recipe.monitor_mode == "max"
    recipe = recipe_that_follows(mean={"val/digit/accuracy": 2, "val/age/mae": 1})
    with pytest.raises(
        UserError, match=r"monitor\.mean: expected metrics that are all to grow or all to fall"
    ):
        _ = recipe.monitor_mode
    with pytest.raises(
        ValueError, match=r"monitor\.mean: expected a metric .* Did you mean val/digit/accuracy"
    ):
        recipe_that_follows(mean={"val/digit/acuracy": 1})
    with pytest.raises(ValueError, match=r"expected metric or mean, found both"):
        recipe_that_follows(metric="val/digit/accuracy", mean={"val/loss": 1})
    again = Recipe.model_validate(recipe.model_dump(mode="json"), strict=False)
    assert again.monitor == recipe.monitor
