"""Tasks are built from a recipe's settings and a dataset's facts, and know their metrics' names."""

import math

import numpy as np
import pytest
import torch

from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import KINDS
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.multilabel import MultilabelSettings
from mtl_dist.tasks.registry import TASKS, build_tasks
from mtl_dist.tasks.regression import RegressionSettings
from mtl_dist.tasks.segmentation import SegmentationSettings
from mtl_dist.tasks.segmentation_losses import BceDiceSettings

INFOS = {
    "breed": TaskInfo("classification", ("siamese", "persian"), 4, (3, 1)),
    "tags": TaskInfo("multilabel", ("indoor", "kitten"), 4, (3, 1)),
    "age": TaskInfo("regression", (), 4, (), mean=5.0, std=2.0, unit="years"),
    "outline": TaskInfo("segmentation", ("background", "cat"), 4, (300, 100)),
    "parts": TaskInfo("segmentation", ("background", "head", "tail"), 4, (300, 100, 50)),
}
SETTINGS = {
    "age": RegressionSettings(),
    "breed": ClassificationSettings(),
    "tags": MultilabelSettings(),
    "outline": SegmentationSettings(),
    "parts": SegmentationSettings(),
}


def test_every_kind_is_built_with_its_defaults_in_the_recipes_order():
    tasks = build_tasks(SETTINGS, INFOS)
    assert list(tasks) == list(SETTINGS)
    for name, task in tasks.items():
        assert (task.name, task.info, task.settings) == (name, INFOS[name], SETTINGS[name])
        assert task.settings.weight == 1.0 and task.head.task == name


def test_every_mistake_is_reported_in_a_line_of_its_own():
    with pytest.raises(UserError) as raised:
        build_tasks(
            {
                "bred": ClassificationSettings(),
                "age": ClassificationSettings(),
                "breed": ClassificationSettings(),
                "parts": SegmentationSettings(loss=BceDiceSettings()),
            },
            INFOS,
        )
    lines = str(raised.value).split("\n")
    assert len(lines) == 3
    assert (
        lines[0].startswith("tasks.bred: expected a task of the dataset")
        and "Did you mean breed?" in lines[0]
    )
    assert lines[1].startswith(
        "tasks.age.kind: expected regression, as the dataset has it, found classification"
    )
    assert lines[2].startswith("tasks.parts.loss.kind: expected cross_entropy or dice")


@pytest.mark.parametrize("name", INFOS)
def test_a_tasks_metrics_have_the_names_its_kind_promises(name):
    task = build_tasks(SETTINGS, INFOS)[name]
    assert list(task.metrics().compute()) == [*task.reported, "num_samples"]
    assert set(task.reported) <= SETTINGS[name].modes.keys()


def test_without_ranking_only_the_metrics_of_an_order_are_missing():
    tasks = build_tasks(SETTINGS, INFOS)
    missing = {
        name: set(task.metrics().compute()) - set(task.metrics(ranking=False).compute())
        for name, task in tasks.items()
    }
    assert missing == {
        "age": set(),
        "breed": {"auroc", "average_precision"},
        "tags": {"auroc", "mean_average_precision"},
        "outline": set(),
        "parts": set(),
    }


def test_errors_are_minimised_and_scores_maximised():
    minimised = {"mae", "rmse", "mse", "abs_rel", "sq_rel", "rmse_log", "log10", "silog"}
    minimised |= {"mean_angle", "median_angle", "ece", "brier", "nme", "pixel_error"}
    minimised |= {"pinball", "nll", "coverage_error", "interval_width", "mean_deviation", "nrmse"}
    for settings in TASKS.values():
        for metric, mode in settings.modes.items():
            assert mode == ("min" if metric in minimised else "max")


def test_every_kind_of_label_has_a_task_and_what_it_is_judged_by_are_metrics_of_its():
    assert list(TASKS) == list(KINDS)
    for settings in TASKS.values():
        assert set(settings.compared) <= set(settings.modes)
        assert settings.learnt_by_heart[0] in settings.modes


@pytest.mark.parametrize("name", INFOS)
def test_the_baseline_is_what_is_most_frequent_or_the_mean(name):
    task = build_tasks(SETTINGS, INFOS)[name]
    baseline = task.baseline()
    output = baseline.output_C[None] if task.layout == "vector" else baseline.output_C[None, :, None, None]
    (answer,) = task.decode(output)
    if name == "age":
        assert (baseline.name, answer["value"]) == ("mean", 5.0)
    elif name == "breed":
        assert (baseline.name, answer["class_name"]) == ("majority", "siamese")
        assert answer["confidence"] == pytest.approx(0.75)
    elif name == "tags":
        assert answer["probabilities"] == pytest.approx({"indoor": 0.75, "kitten": 0.25})
    else:
        assert answer["mask"].tolist() == [[0]]


def test_a_class_is_decoded_with_its_name_and_all_probabilities():
    task = build_tasks(SETTINGS, INFOS)["breed"]
    first, second = task.decode(torch.tensor([[math.log(3.0), 0.0], [0.0, 1.0]]))
    assert (first["class_id"], first["class_name"]) == (0, "siamese")
    assert first["confidence"] == pytest.approx(0.75)
    assert first["probabilities"] == pytest.approx({"siamese": 0.75, "persian": 0.25})
    assert second["class_name"] == "persian"


def test_labels_are_decoded_above_the_threshold():
    task = build_tasks(SETTINGS, INFOS)["tags"]
    output = torch.tensor([[math.log(3.0), -1.0]])
    assert task.decode(output)[0]["labels"] == ["indoor"]
    assert task.decode(output, threshold=0.8)[0]["labels"] == []
    assert task.decode(output, threshold=0.2)[0]["labels"] == ["indoor", "kitten"]
    assert task.decode(output)[0]["probabilities"]["indoor"] == pytest.approx(0.75)


def test_a_number_is_decoded_in_its_unit():
    assert build_tasks(SETTINGS, INFOS)["age"].decode(torch.tensor([[1.5], [-1.0]])) == [
        {"value": 8.0, "unit": "years"},
        {"value": 3.0, "unit": "years"},
    ]


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_a_mask_of_two_classes_is_decoded_alike_from_one_output_and_from_two(num_outputs):
    task = build_tasks(SETTINGS, INFOS)["outline"]
    foreground_1HW = torch.tensor([[[math.log(3.0), -2.0, 0.0], [5.0, -5.0, -5.0]]])
    output = foreground_1HW[:, None]
    if num_outputs == 2:
        output = torch.stack([torch.ones_like(foreground_1HW), 1 + foreground_1HW], dim=1)
    (found,) = task.decode(output)
    assert found["mask"].dtype == np.uint8 and found["mask"].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert found["probability"].shape == (2, 3) and found["probability"][0, 0] == pytest.approx(0.75)
    assert found["area_ratio"] == pytest.approx(2 / 6)
    assert task.decode(output, threshold=0.8)[0]["mask"].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_a_mask_of_more_classes_is_decoded_with_the_area_of_each():
    output = torch.zeros(1, 3, 2, 2)
    output[0, 1, 0, 0] = output[0, 2, 0, 1] = output[0, 0, 1] = 1.0
    (found,) = build_tasks(SETTINGS, INFOS)["parts"].decode(output)
    assert found["mask"].tolist() == [[1, 2], [0, 0]] and found["area_ratio"] == 0.5
    assert found["area_ratios"] == {"background": 0.5, "head": 0.25, "tail": 0.25}


@pytest.mark.parametrize("name", ["tags", "outline"])
@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 50.0])
def test_a_threshold_that_is_no_probability_is_refused(name, threshold):
    task = build_tasks(SETTINGS, INFOS)[name]
    output = torch.zeros(1, task.head.num_outputs, *([2, 2] if name == "outline" else []))
    with pytest.raises(UserError, match="threshold: expected a probability between 0 and 1"):
        task.decode(output, threshold)
