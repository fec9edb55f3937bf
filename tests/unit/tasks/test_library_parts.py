"""Losses of torch.nn and metrics of torchmetrics by their path mean what they mean there, or are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torchmetrics.functional import classification, regression, segmentation

from mtl_dist.errors import UserError
from mtl_dist.kinds.normals import Normals
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.library_losses import build_library_loss
from mtl_dist.tasks.registry import TaskSettings, build_tasks
from mtl_dist.tasks.task import Loss, Task
from mtl_dist.tasks.trying import try_parts
from mtl_dist.tasks.user_metrics import AllMetrics

SETTINGS: TypeAdapter[Any] = TypeAdapter(TaskSettings)
INFOS = {
    "two": TaskInfo("classification", ("ill", "well"), 9, (4, 5)),
    "three": TaskInfo("classification", ("a", "b", "c"), 9, (3, 3, 3)),
    "tags": TaskInfo("multilabel", ("a", "b", "c"), 9, (3, 3, 3)),
    "age": TaskInfo("regression", (), 9, (), mean=40.0, std=12.0, minimum=1.0, maximum=90.0),
    "lesion": TaskInfo("segmentation", ("background", "lesion"), 9, (900, 100)),
    "parts": TaskInfo("segmentation", ("background", "cat", "border"), 9, (700, 200, 100)),
    "depth": TaskInfo("depth", (), 9, (), mean=3.0, std=1.5, minimum=0.5),
}


def build(name: str, **settings: Any) -> Task:
    raw = {"kind": INFOS[name].kind, **settings}
    return build_tasks({name: SETTINGS.validate_python(raw)}, {name: INFOS[name]})[name]


def batch(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """The task's made samples, every fourth without a label."""
    example = task.example()
    assert example is not None
    return *example, torch.arange(len(example[1])) % 4 != 0


def mean_loss(task: Task) -> float:
    """As the ranks and micro-batches of a window have it: parts of unequal size, sums over sums."""
    parts = list(zip(*(tensor.split([1, 6, 5]) for tensor in batch(task)), strict=True))
    total = sum(task.count(target, labelled) for _, target, labelled in parts)
    return float(sum(task.loss_sum(*part) for part in parts) / total)


class Flow(Normals):
    """A direction in the image for each pixel."""

    channels = 2


@pytest.mark.parametrize(("kind", "num_outputs"), [("normals", 3), (f"{__name__}.Flow", 2), ("depth", 1)])
def test_a_loss_of_maps_has_as_many_outputs_as_the_kind_has_values(kind: str, num_outputs: int) -> None:
    loss = build_library_loss(nn.L1Loss(reduction="none"), TaskInfo(kind), "tasks.flow.loss")
    assert loss.num_outputs == num_outputs


LOSSES: dict[str, tuple[str, dict[str, Any], nn.Module]] = {
    "cross entropy": ("three", {}, nn.CrossEntropyLoss()),
    "class weights, an ignored class": (
        "three",
        {"weight": [1.0, 2.0, 5.0], "ignore_index": 1, "label_smoothing": 0.1},
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]), ignore_index=1, label_smoothing=0.1),
    ),
    "NLL": ("three", {"weight": [1.0, 2.0, 5.0]}, nn.NLLLoss(torch.tensor([1.0, 2.0, 5.0]))),
    "whole class weights": (
        "three",
        {"weight": [1, 2, 5]},
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0])),
    ),
    "a margin": ("three", {"p": 2}, nn.MultiMarginLoss(p=2)),
    "labels": ("tags", {"pos_weight": [1, 2, 3]}, nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1, 2, 3]))),
    "soft margins": ("tags", {}, nn.MultiLabelSoftMarginLoss()),
    "a number": ("age", {"delta": 0.3}, nn.HuberLoss(delta=0.3)),
    "masks": (
        "parts",
        {"weight": [1.0, 2.0, 5.0]},
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]), ignore_index=255),
    ),
    "a foreground": ("lesion", {"pos_weight": 3.0}, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))),
    "depth": ("depth", {"beta": 0.5}, nn.SmoothL1Loss(beta=0.5)),
}


@pytest.mark.parametrize("which", LOSSES)
def test_a_loss_of_torch_is_its_mean_over_all_labels_however_they_are_divided(which: str) -> None:
    name, arguments, module = LOSSES[which]
    if which == "a foreground":
        arguments = {"pos_weight": [3.0]}
    path = f"torch.nn.{type(module).__name__}"
    task = build(name, loss={"kind": path, **arguments})
    output, target, labelled = batch(task)
    output, target = output[labelled], target[labelled]
    if which == "NLL":
        output = output.log_softmax(dim=1)
    elif which == "a number":
        output, target = output.squeeze(1), (target - 40.0) / 12.0
    elif which == "masks":
        target = target.long()
    elif which == "a foreground":
        valid = target != 255
        output, target = output[:, 0][valid], (target == 1).float()[valid]
    elif which == "depth":
        valid = target.isfinite()
        output, target = output[:, 0][valid], ((target - 3.0) / 1.5)[valid]
    assert mean_loss(task) == pytest.approx(float(module(output, target)), rel=1e-5)


REFUSED_LOSSES = {
    "no reduction": ("three", "torch.nn.modules.loss.NLLLoss2d", {}, r"expected a loss with a `reduction`"),
    "numbers for classes": ("three", "torch.nn.MSELoss", {}, r"MSELoss: it compares numbers"),
    "another signature": ("age", "torch.nn.GaussianNLLLoss", {}, r"GaussianNLLLoss.* 'var'"),
    "distributions": ("tags", "torch.nn.KLDivLoss", {}, r"KLDivLoss, which is none of a task of multilabel"),
    "yes and no": ("age", "torch.nn.SoftMarginLoss", {}, r"SoftMarginLoss, which is none of a task"),
    "weights": ("three", "torch.nn.CrossEntropyLoss", {"weight": [1.0]}, r"CrossEntropyLoss: weight tensor"),
}


@pytest.mark.parametrize("which", REFUSED_LOSSES)
def test_a_loss_that_does_not_fit_is_refused_by_its_name_before_training(which: str) -> None:
    name, path, arguments, line = REFUSED_LOSSES[which]
    with pytest.raises(UserError, match=rf"^tasks\.{name}\.loss.*{line}"):
        try_parts({name: build(name, loss={"kind": path, **arguments})})


class Summed(Loss):
    num_outputs = 3

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def denominators(self, target: Tensor) -> Tensor:
        return torch.ones(len(target))


def test_a_loss_of_the_users_that_is_none_per_sample_is_refused_at_its_first_call() -> None:
    from dataclasses import replace

    task = replace(build("three"), loss=Summed())
    with pytest.raises(UserError, match=r"tasks\.three\.loss: expected numerators of shape \(12,\).* \(\)"):
        task.loss_sum(*batch(task))


class Counted(Loss):
    """The share of wrong classes: finite, of the right shape, and nothing that could be learnt from."""

    num_outputs = 3

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) != target).float()

    def denominators(self, target: Tensor) -> Tensor:
        return torch.ones(len(target))


def test_a_loss_without_a_gradient_is_refused_before_training() -> None:
    with pytest.raises(UserError, match=r"tasks\.three\.loss: expected a loss with a gradient, found none"):
        try_parts({"three": build("three", loss={"kind": f"{__name__}.Counted"})})


def measured(name: str, path: str, settings: dict[str, Any] | None = None, **arguments: Any) -> float:
    task = build(name, metrics={"m": {"kind": path, **arguments}}, **(settings or {}))
    try_parts({name: task})
    metrics = AllMetrics(task)
    for part in zip(*(tensor.split(5) for tensor in batch(task)), strict=True):
        metrics.update(*part)
    return metrics.compute()["m"]


def labelled(name: str, **settings: Any) -> tuple[Tensor, Tensor]:
    task = build(name, **settings)
    output, target, mask = batch(task)
    output, target = task.metric_inputs(output, target)
    return output[mask], target[mask]


def test_metrics_of_classes_are_handed_probabilities() -> None:
    output, target = labelled("three")
    p = output.softmax(dim=1)
    path = "torchmetrics.classification"
    found = measured("three", f"{path}.MulticlassF1Score", num_classes=3, average="micro")
    assert found == pytest.approx(classification.multiclass_f1_score(p, target, 3, average="micro").item())
    found = measured("three", f"{path}.MulticlassAUROC", num_classes=3)
    assert found == pytest.approx(classification.multiclass_auroc(p, target, 3).item())
    found = measured("three", "torchmetrics.Accuracy", task="multiclass", num_classes=3)
    assert found == pytest.approx(classification.multiclass_accuracy(p, target, 3, average="micro").item())


@pytest.mark.parametrize(("positive", "index"), [("ill", 0), ("well", 1)])
def test_metrics_of_two_classes_are_of_the_positive_one(positive: str, index: int) -> None:
    output, target = labelled("two")
    expected = classification.binary_average_precision(
        output.softmax(dim=1)[:, index], (target == index).long()
    )
    path = "torchmetrics.classification.BinaryAveragePrecision"
    assert measured("two", path, {"positive": positive}) == pytest.approx(expected.item())


def test_metrics_of_labels_masks_and_numbers_have_the_form_that_they_want() -> None:
    output, target = labelled("tags")
    found = measured("tags", "torchmetrics.classification.MultilabelF1Score", num_labels=3)
    assert found == pytest.approx(
        classification.multilabel_f1_score(output.sigmoid(), target.long(), 3).item()
    )

    output, target = labelled("age")
    found = measured("age", "torchmetrics.regression.PearsonCorrCoef")
    assert found == pytest.approx(regression.pearson_corrcoef(output, target).item(), rel=1e-5)  # float32

    output, target = labelled("parts")
    valid = target != 255
    found = measured("parts", "torchmetrics.classification.MulticlassJaccardIndex", num_classes=3)
    p = output.softmax(dim=1).movedim(1, -1)
    assert found == pytest.approx(classification.multiclass_jaccard_index(p[valid], target[valid], 3).item())


@pytest.mark.skipif(
    not hasattr(segmentation, "dice_score"), reason="torchmetrics before 1.5 has no Dice score"
)
def test_the_overlap_of_masks_is_handed_classes_one_by_one() -> None:
    output, target = labelled("parts")
    valid = target != 255
    one_hot = [
        nn.functional.one_hot(classes.where(valid, torch.tensor(0)), 3).movedim(-1, 1) * valid[:, None]
        for classes in (output.argmax(dim=1), target)
    ]
    path = "torchmetrics.segmentation.DiceScore"
    found = measured("parts", path, num_classes=3, average="micro", aggregation_level="global")
    expected = segmentation.dice_score(*one_hot, 3, average="micro", aggregation_level="global")
    assert found == pytest.approx(expected.item())
    overlap = 2 * (one_hot[0] * one_hot[1]).sum() / (one_hot[0].sum() + one_hot[1].sum())
    assert found == pytest.approx(overlap.item())


REFUSED_METRICS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "of two": (
        "three",
        "BinaryF1Score",
        {},
        r"expected a task of two classes for BinaryF1Score, found one of 3",
    ),
    "classes": ("three", "MulticlassF1Score", {"num_classes": 4}, r"ValueError in .*MulticlassF1Score"),
    "several": (
        "three",
        "MulticlassRecall",
        {"num_classes": 3, "average": "none"},
        r"expected one number, found 3",
    ),
    "a curve": ("two", "BinaryROC", {}, r"expected one number, found a tuple"),
    "labels": (
        "tags",
        "MulticlassRecall",
        {"num_classes": 3},
        r"expected a Multilabel metric for multilabel",
    ),
    "numbers": ("age", "BinaryF1Score", {}, r"expected a regression metric for regression"),
}


@pytest.mark.parametrize("which", REFUSED_METRICS)
def test_a_metric_that_does_not_fit_is_refused_by_its_name_before_training(which: str) -> None:
    name, metric, arguments, line = REFUSED_METRICS[which]
    path = f"torchmetrics.classification.{metric}"
    with warnings.catch_warnings(), pytest.raises(UserError, match=rf"^tasks\.{name}\.metrics\.m: .*{line}"):
        try_parts({name: build(name, metrics={"m": {"kind": path, **arguments}})})
