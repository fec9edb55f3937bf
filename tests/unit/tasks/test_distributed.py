"""Metrics over two real ranks are those of one."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_dist.engine.connect import connect
from mtl_dist.engine.settings import EngineSettings
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.depth import DepthSettings
from mtl_dist.tasks.keypoints import KeypointsSettings
from mtl_dist.tasks.multilabel import MultilabelSettings
from mtl_dist.tasks.normals import NormalsSettings
from mtl_dist.tasks.number_losses import GaussianNllSettings, QuantileSettings
from mtl_dist.tasks.ordinal import OrdinalSettings
from mtl_dist.tasks.regression import RegressionSettings
from mtl_dist.tasks.segmentation import SegmentationSettings
from mtl_dist.tasks.task import Task
from mtl_dist.tasks.user_metrics import AllMetrics
from mtl_dist.tasks.vector import VectorSettings
from tests.ranks import shared_pool

Batch = tuple[Tensor, Tensor, Tensor]
Gather = Callable[[Any], list[Any]]

TASKS: dict[str, Task] = {
    name: settings.build(name, info)
    for name, settings, info in [
        ("two", ClassificationSettings(), TaskInfo("classification", ("a", "b"), 9)),
        ("three", ClassificationSettings(), TaskInfo("classification", ("a", "b", "c"), 9)),
        ("tags", MultilabelSettings(), TaskInfo("multilabel", ("a", "b", "c"), 9)),
        ("age", RegressionSettings(), TaskInfo("regression", mean=40.0, std=12.0)),
        (
            "age with quantiles",
            RegressionSettings(loss=QuantileSettings()),
            TaskInfo("regression", mean=40.0, std=12.0),
        ),
        (
            "age with a deviation",
            RegressionSettings(loss=GaussianNllSettings()),
            TaskInfo("regression", mean=40.0, std=12.0),
        ),
        (
            "pose",
            VectorSettings(),
            TaskInfo(
                "vector",
                ("a", "b"),
                9,
                facts={
                    "labels": [9, 9],
                    "mean": [1.0, 2.0],
                    "std": [1.0, 3.0],
                    "minimum": [0.0] * 2,
                    "maximum": [9.0] * 2,
                },
            ),
        ),
        (
            "depth",
            DepthSettings(),
            TaskInfo("depth", num_labelled=9, mean=3.0, std=1.5, minimum=0.5),
        ),
        ("normals", NormalsSettings(), TaskInfo("normals")),
        ("grade", OrdinalSettings(), TaskInfo("ordinal", ("none", "mild", "severe"), 9)),
        ("points", KeypointsSettings(), TaskInfo("keypoints", ("a", "b", "c"))),
        (
            "points of numbers",
            KeypointsSettings(head="regression", reference="extent"),
            TaskInfo("keypoints", ("a", "b", "c")),
        ),
        ("mask", SegmentationSettings(), TaskInfo("segmentation", ("background", "a", "b"), 9)),
    ]
}

BATCHES = {
    "both ranks have labels": ([True, True], [True, True]),
    "one rank has more batches": ([True, True, True], [True]),
    "one rank has no label": ([True, True], [False, False]),
    "one rank has no batch": ([True, True], []),
    "no rank has a label": ([False], [False]),
    "no rank has a batch": ([], []),
}
"""For each rank whether the samples of its batches have labels."""


def batches(task: Task, labelled: list[bool], rank: int) -> list[Batch]:
    """Batches of four and five samples; of a labelled batch the second sample has no label all the same."""
    key = torch.Generator().manual_seed(rank)
    num_classes = len(task.info.classes)
    size = [3, 3] if task.head.layout == "map" else []
    made = []
    for index, has_labels in enumerate(labelled):
        num = 4 + index % 2
        output = torch.randn(num, task.head.num_outputs, *size, generator=key)
        match task.info.kind:
            case "multilabel":
                target = torch.randint(2, (num, num_classes), generator=key).float()
            case "regression":
                target = 40 + 12 * torch.randn(num, generator=key)
            case "vector":
                target = torch.randn(num, 2, generator=key)
                target[2, 1] = math.nan
            case "classification" | "ordinal":
                target = torch.randint(num_classes, (num,), generator=key)
            case "depth":
                target = 0.5 + 5 * torch.rand(num, *size, generator=key)
                target[:, 1] = math.nan
            case "normals":
                target = F.normalize(torch.randn(num, 3, *size, generator=key), dim=1)
                target[:, :, 1] = math.nan
            case "keypoints":
                target = torch.rand(num, num_classes + 3, 3, generator=key)
                target[:, :-3, 2] = torch.randint(3, (num, num_classes), generator=key)
                target[:, 0, 2] = target[:, 1, 2] = 2  # there is a length to measure by
            case "segmentation":
                target = torch.randint(num_classes, (num, *size), generator=key).to(torch.uint8)
        labelled_B = torch.full((num,), has_labels)
        labelled_B[1] = False
        made.append((output, target, labelled_B))
    return made


def measure(
    task: Task, given: list[Batch], gather: Gather = lambda own: [own]
) -> tuple[dict[str, float], Any]:
    metrics = AllMetrics(task, gather)
    metrics.calibrate(None)
    for batch in given:
        metrics.update(*batch)
    values, found = metrics.compute(), metrics.calibrated()
    if found is not None:
        values = values | {"temperature": found.temperature, "nll after it": found.after["nll"]}
    return values, metrics.confusion_matrix()


def measured_on_a_rank() -> dict[tuple[str, str], Any]:
    world = connect(EngineSettings(), "fp32").world
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {
            (case, name): measure(task, batches(task, labelled[world.rank], world.rank), world.gather)
            for case, labelled in BATCHES.items()
            for name, task in TASKS.items()
        }


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[str, str], Any]]:
    return shared_pool(2).run(measured_on_a_rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("case", BATCHES)
def test_two_ranks_measure_what_one_does_and_agree(found, case, name):
    task = TASKS[name]
    together = [batch for rank in range(2) for batch in batches(task, BATCHES[case][rank], rank)]
    expected, expected_matrix = measure(task, together)
    for values, matrix in (rank[case, name] for rank in found):
        assert values == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert (matrix is None and expected_matrix is None) or (matrix == expected_matrix).all()
    if case.startswith("no rank"):
        assert all(math.isnan(value) for key, value in expected.items() if key != "num_samples")
    else:
        assert expected["num_samples"] > 0
