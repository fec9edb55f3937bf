"""The metrics have scikit-learn's values on the labelled samples, each counted once."""

import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import Tensor
from torchmetrics.functional import classification as functional

from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.accumulator import Accumulator
from mtl_dist.tasks.classification import ClassificationSettings, ClassificationTask
from mtl_dist.tasks.metrics import TaskMetrics
from mtl_dist.tasks.multilabel import MultilabelSettings
from mtl_dist.tasks.ranking import auroc, average_precision
from mtl_dist.tasks.regression import RegressionSettings
from mtl_dist.tasks.segmentation import SegmentationSettings
from mtl_dist.tasks.segmentation_losses import BceDiceSettings
from mtl_dist.tasks.task import Task
from mtl_dist.tasks.thresholds import choose


def classification(num_classes: int) -> Task:
    classes = tuple("abcdefgh"[:num_classes])
    return ClassificationSettings().build("it", TaskInfo("classification", classes, 9, (3,) * num_classes))


MULTILABEL = MultilabelSettings().build("it", TaskInfo("multilabel", ("a", "b", "c"), 9, (3, 3, 3)))
REGRESSION = RegressionSettings().build("it", TaskInfo("regression", (), 9, (), mean=40.0, std=12.0))
PETS = SegmentationSettings().build("it", TaskInfo("segmentation", ("background", "cat", "border"), 9))
LESION = SegmentationSettings(loss=BceDiceSettings()).build(
    "it", TaskInfo("segmentation", ("background", "lesion"), 9)
)


def measured(
    task: Task, output: Tensor, target: Tensor, labelled_B: Tensor | None = None
) -> dict[str, float]:
    """The metrics over batches of three, as NaN-proof floats."""
    labelled_B = torch.ones(len(target), dtype=torch.bool) if labelled_B is None else labelled_B
    metrics = task.metrics()
    for batch in zip(output.split(3), target.split(3), labelled_B.split(3), strict=True):
        metrics.update(*batch)
    return metrics.compute()


def decided(metrics: dict[str, float]) -> dict[str, float]:
    """Those of decisions and of orders, without those of the probabilities themselves."""
    return {name: value for name, value in metrics.items() if name not in ("ece", "brier")}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


close = partial(pytest.approx, rel=1e-6, abs=1e-9)
same = partial(pytest.approx, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_classification_metrics_are_scikit_learns(num_classes):
    output = 2 * normal(200, num_classes)
    target = (normal(200, seed=1).abs() * 1.5).long().clamp(max=num_classes - 1)
    probabilities, predicted = output.double().softmax(dim=1).numpy(), output.argmax(dim=1)
    scores = probabilities[:, 1] if num_classes == 2 else probabilities
    of_positive = {}
    if num_classes == 2:
        of_positive = {
            "precision": reference.precision_score(target, predicted),
            "recall": reference.recall_score(target, predicted),
            "specificity": reference.recall_score(target, predicted, pos_label=0),
            "f1": reference.f1_score(target, predicted),
            "average_precision": reference.average_precision_score(target, scores),
        }
    assert decided(measured(classification(num_classes), output, target)) == close(
        {
            "accuracy": reference.accuracy_score(target, predicted),
            "balanced_accuracy": reference.balanced_accuracy_score(target, predicted),
            **of_positive,
            "auroc": reference.roc_auc_score(target, scores, multi_class="ovr"),
            **averages(target, predicted),
            "num_samples": 200.0,
        }
    )


def averages(target, predicted) -> dict[str, float]:
    """scikit-learn's macro and micro averages, by their names here."""
    functions = {
        "precision": reference.precision_score,
        "recall": reference.recall_score,
        "f1": reference.f1_score,
    }
    return {
        f"{average}_{name}": function(target, predicted, average=average, zero_division=0)
        for average in ("macro", "micro")
        for name, function in functions.items()
    }


def two_classes(**settings) -> ClassificationTask:
    task = ClassificationSettings(**settings).build(
        "it", TaskInfo("classification", ("ill", "well"), 9, (4, 5))
    )
    assert isinstance(task, ClassificationTask)
    return task


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.85])
@pytest.mark.parametrize(("positive", "index"), [("ill", 0), ("well", 1), (None, 1)])
def test_the_metrics_of_two_classes_are_those_of_the_positive_one(positive, index, threshold):
    output = 2 * normal(200, 2)
    target = (normal(200, seed=1) > 0.5).long()
    score = output.double().softmax(dim=1)[:, index]
    predicted, truth = score > threshold, target == index
    task = two_classes(positive=positive, threshold=threshold)
    found = measured(task, output, target)
    expected = {
        "accuracy": reference.accuracy_score(truth, predicted),
        "precision": reference.precision_score(truth, predicted),
        "recall": reference.recall_score(truth, predicted),
        "specificity": reference.recall_score(~truth, ~predicted),
        "f1": reference.f1_score(truth, predicted),
        "auroc": reference.roc_auc_score(truth, score),
        "average_precision": reference.average_precision_score(truth, score),
        **averages(truth, predicted),
    }
    assert {name: found[name] for name in expected} == close(expected)
    assert [answer["class_id"] == index for answer in task.decode(output)] == predicted.tolist()


def test_metrics_of_a_positive_class_that_does_not_occur_are_undefined():
    found = measured(two_classes(), torch.tensor([[1.0, 0.0]] * 3), torch.zeros(3, dtype=torch.long))
    undefined = {"precision", "recall", "f1", "auroc", "average_precision"}
    assert {name for name, value in found.items() if math.isnan(value)} == undefined
    assert found["specificity"] == 1.0


def score_of(rule: str, truth: Tensor, predicted: Tensor) -> float:
    if rule == "best_f1":
        return float(reference.f1_score(truth, predicted, zero_division=0))
    return float(reference.recall_score(truth, predicted) + reference.recall_score(~truth, ~predicted) - 1)


@pytest.mark.parametrize("rule", ["best_f1", "youden"])
@pytest.mark.parametrize("coarse", [False, True])
def test_a_chosen_threshold_is_the_best_of_all(rule, coarse):
    score = 2 * normal(120) - 1
    score = (score * 2).round() / 2 if coarse else score
    truth = normal(120, seed=1) + score > 0.8
    threshold = choose(rule, score, truth)
    probability = score.double().sigmoid()
    tried = [0.0, *probability.tolist()]
    assert score_of(rule, truth, probability > threshold) == close(
        max(score_of(rule, truth, probability > each) for each in tried)
    )
    assert 0 < threshold < 1


@pytest.mark.parametrize("rule", ["best_f1", "youden"])
def test_a_pass_that_chooses_has_the_metrics_of_what_it_chose(rule):
    output, target = 2 * normal(100, 2), (normal(100, seed=1) > 0.8).long()
    task = two_classes(threshold=rule)
    assert task.thresholds == (0.5,) and measured(task, output, target) == close(
        measured(two_classes(), output, target)
    )
    choosing = task.metrics(choosing=True)
    choosing.update(output, target, torch.ones(100, dtype=torch.bool))
    found = choosing.compute()
    assert choosing.chosen_thresholds() == (found.pop("threshold"),)
    chosen = replace(task, chosen=choosing.chosen_thresholds())
    assert measured(chosen, output, target) == close(found)


def test_the_labels_of_a_sample_have_thresholds_of_their_own():
    output, target = normal(100, 3), (normal(100, 3, seed=1) > 0.5).float()
    task = MultilabelSettings(threshold="best_f1").build("it", MULTILABEL.info)
    choosing = task.metrics(choosing=True)
    choosing.update(output, target, torch.ones(100, dtype=torch.bool))
    found, chosen = choosing.compute(), choosing.chosen_thresholds()
    expected = [choose("best_f1", *column) for column in zip(output.T, target.T, strict=True)]
    assert list(chosen) == expected and len(set(expected)) == 3
    predicted = output.double().sigmoid() > torch.tensor(expected, dtype=torch.float64)
    truth = target.numpy().astype(int)
    assert {name: found[name] for name in averages(truth, predicted)} == close(averages(truth, predicted))
    learnt = replace(task, chosen=chosen)
    assert measured(learnt, output, target) == close(found)
    labels = [[name in answer["labels"] for name in "abc"] for answer in learnt.decode(output)]
    assert labels == predicted.tolist()


def test_there_is_nothing_to_choose_by_without_a_positive_or_a_negative():
    nothing = torch.zeros(4, dtype=torch.bool)
    for positive in (nothing, ~nothing):
        assert choose("best_f1", normal(4), positive) == 0.5
    assert choose("youden", torch.tensor([0.1, math.nan]), torch.tensor([True, False])) == 0.5


@pytest.mark.parametrize(
    ("settings", "classes", "line"),
    [
        (
            {"positive": "il"},
            "ill well",
            r"tasks\.it\.positive: expected one of the classes, found 'il'\. Did",
        ),
        ({"positive": "a"}, "a b c", r"tasks\.it\.positive: expected a task of two classes, found one of 3"),
        ({"threshold": 0.3}, "a b c", r"tasks\.it\.threshold: expected a task of two classes"),
        ({"threshold": "youden"}, "a b c", r"tasks\.it\.threshold: expected a task of two classes"),
    ],
)
def test_positive_class_and_threshold_are_refused_where_there_is_none(settings, classes, line):
    with pytest.raises(UserError, match=line):
        ClassificationSettings(**settings).build("it", TaskInfo("classification", tuple(classes.split())))


def test_classification_metrics_are_torchmetrics():
    output, target = 2 * normal(200, 4), torch.arange(200) % 4
    found = measured(classification(4), output, target)
    probabilities = output.softmax(dim=1)
    assert found["macro_precision"] == close(functional.multiclass_precision(probabilities, target, 4).item())
    assert found["macro_recall"] == close(functional.multiclass_recall(probabilities, target, 4).item())
    assert found["macro_f1"] == close(functional.multiclass_f1_score(probabilities, target, 4).item())
    assert found["auroc"] == close(functional.multiclass_auroc(probabilities, target, 4).item())


def test_a_class_that_does_not_occur_is_left_out_of_the_averages():
    target = torch.tensor([0, 0, 1, 1, 0])
    output = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [1.0, 3.0], [3.0, 0.0]])
    never_predicted = torch.cat([output, torch.full((5, 1), -9.0)], dim=1)
    of_three, of_two = (
        measured(task, each, target)
        for task, each in ((classification(3), never_predicted), (classification(2), output))
    )
    assert decided(of_three) == pytest.approx({name: of_two[name] for name in decided(of_three)})

    predicted_once = never_predicted.clone()
    predicted_once[0, 2] = 9.0
    found = measured(classification(3), predicted_once, target)
    predicted = predicted_once.argmax(dim=1)
    macro = {"average": "macro", "zero_division": 0}
    assert found["macro_recall"] == close(reference.recall_score(target, predicted, **macro))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["balanced_accuracy"] == close(reference.balanced_accuracy_score(target, predicted))


def test_confident_scores_do_not_tie():
    output = torch.tensor([[0.0, 20.0], [0.0, 21.0], [0.0, 22.0], [0.0, 23.0]])
    assert bool((output.softmax(dim=1)[:, 1] == 1).all())
    assert measured(classification(2), output, torch.tensor([0, 0, 1, 1]))["auroc"] == 1.0
    padded = torch.cat([output, torch.full((4, 1), -30.0)], dim=1)
    assert measured(classification(3), padded, torch.tensor([0, 1, 0, 1]))["auroc"] == 0.75


def test_ranking_counts_ties_half_and_matches_scikit_learn():
    scores = (4 * normal(300)).round()
    positive = normal(300, seed=1) + scores / 5 > 0.4
    assert auroc(scores, positive) == close(reference.roc_auc_score(positive, scores))
    assert average_precision(scores, positive) == close(reference.average_precision_score(positive, scores))
    assert auroc(torch.zeros(10), torch.arange(10) < 3) == 0.5


def test_ranking_is_undefined_without_a_positive_and_with_undefined_scores():
    nothing = torch.zeros(4, dtype=torch.bool)
    assert math.isnan(auroc(normal(4), nothing)) and math.isnan(auroc(normal(4), ~nothing))
    assert math.isnan(average_precision(normal(4), nothing)) and average_precision(normal(4), ~nothing) == 1
    undefined = torch.tensor([0.1, math.nan, 0.3])
    some = torch.tensor([True, False, True])
    assert math.isnan(auroc(undefined, some)) and math.isnan(average_precision(undefined, some))


def test_multilabel_metrics_are_scikit_learns():
    output, target = normal(200, 3), (normal(200, 3, seed=1) > 0.5).float()
    truth, predicted = target.numpy().astype(int), (output > 0).numpy().astype(int)
    macro = {"average": "macro"}
    assert decided(measured(MULTILABEL, output, target)) == close(
        {
            "accuracy": 1 - reference.hamming_loss(truth, predicted),
            **averages(truth, predicted),
            "auroc": reference.roc_auc_score(truth, output, **macro),
            "mean_average_precision": reference.average_precision_score(truth, output, **macro),
            "num_samples": 200.0,
        }
    )


def ties(task: Task, output: Tensor, target: Tensor) -> dict[str, float]:
    """What is said of a constant answer without keeping its scores."""
    metrics = task.metrics(ranking=False)
    metrics.update(output, target, torch.ones(len(target), dtype=torch.bool))
    assert isinstance(metrics, Accumulator)
    supports = [row["support"] for row in metrics.per_class()]
    return task.of_ties(supports, metrics.compute()["num_samples"])


def test_a_constant_answer_has_scikit_learns_metrics_of_an_order():
    target = (normal(50, 3, seed=1) > 0.3).float()
    output = torch.tensor([2.0, -1.0, -3.0]).expand(50, 3)
    truth, scores = target.numpy().astype(int), output.numpy()
    found = ties(MULTILABEL, output, target)
    assert found == close(
        {
            "auroc": reference.roc_auc_score(truth, scores),
            "mean_average_precision": reference.average_precision_score(truth, scores, average="macro"),
        }
    )
    assert found == close({name: measured(MULTILABEL, output, target)[name] for name in found})
    target[:, 2] = 0  # a label that does not occur is left out
    assert ties(MULTILABEL, output, target)["mean_average_precision"] == close(
        reference.average_precision_score(truth[:, :2], scores[:, :2], average="macro")
    )
    assert ties(MULTILABEL, output, torch.zeros(50, 3)) == {}


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_constant_class_has_the_metrics_of_an_order_that_ties_have(num_classes: int):
    task = classification(num_classes)
    target = torch.arange(20) % 7 % num_classes
    output = normal(1, num_classes).expand(20, num_classes)
    found = ties(task, output, target)
    assert found.keys() == {"auroc"} | ({"average_precision"} if num_classes == 2 else set())
    assert found == close({name: measured(task, output, target)[name] for name in found})


def test_a_label_that_does_not_occur_is_left_out_of_the_averages():
    output, target = normal(20, 3), (normal(20, 3, seed=1) > 0.5).float()
    output[:, 2], target[:, 2] = -5.0, 0.0
    found = measured(MULTILABEL, output, target)
    truth, predicted = target[:, :2].numpy().astype(int), (output[:, :2] > 0).numpy().astype(int)
    assert found["macro_f1"] == close(reference.f1_score(truth, predicted, average="macro"))
    assert found["auroc"] == close(reference.roc_auc_score(truth, output[:, :2], average="macro"))
    assert found["mean_average_precision"] == close(
        reference.average_precision_score(truth, output[:, :2], average="macro")
    )


@pytest.mark.parametrize(("scale", "offset"), [(12.0, 40.0), (1e-4, 0.0), (1.0, 1e5)])
def test_regression_metrics_are_scikit_learns_in_the_targets_unit(scale, offset):
    info = TaskInfo("regression", (), 9, (), mean=offset, std=scale)
    task = RegressionSettings().build("it", info)
    target = offset + scale * normal(200)
    output = normal(200, 1) + 0.3 * normal(200, 1, seed=1)
    predicted = output[:, 0].double() * scale + offset
    assert measured(task, output, target) == pytest.approx(
        {
            "mae": reference.mean_absolute_error(target.double(), predicted),
            "rmse": reference.root_mean_squared_error(target.double(), predicted),
            "mse": reference.mean_squared_error(target.double(), predicted),
            "r2": reference.r2_score(target.double(), predicted),
            "num_samples": 200.0,
        },
        rel=1e-9,
    )


def test_r2_is_undefined_for_one_sample_and_for_targets_that_do_not_vary():
    for num in (1, 5):
        found = measured(REGRESSION, normal(num, 1), torch.full((num,), 33.3))
        assert math.isnan(found["r2"]) and found["mae"] > 0


def test_masks_are_measured_by_the_pixels_of_the_whole_split_over_foreground_classes():
    output = 2 * normal(7, 3, 6, 5)
    target = torch.randint(3, (7, 6, 5), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    target[:, :2, :3] = 255
    valid = (target != 255).numpy()
    truth, predicted = target.numpy()[valid], output.argmax(dim=1).numpy()[valid]
    foreground = {"labels": [1, 2], "average": "macro"}
    assert measured(PETS, output, target) == close(
        {
            "dice": reference.f1_score(truth, predicted, **foreground),
            "iou": reference.jaccard_score(truth, predicted, **foreground),
            "pixel_accuracy": reference.accuracy_score(truth, predicted),
            "num_samples": 7.0,
        }
    )


def test_masks_of_two_classes_are_measured_by_their_foreground():
    output, target = normal(4, 1, 6, 5), (normal(4, 6, 5, seed=1) > 0).to(torch.uint8)
    truth, predicted = target.flatten(), (output > 0).flatten()
    found = measured(LESION, output, target)
    assert found["dice"] == close(reference.f1_score(truth, predicted))
    assert found["iou"] == close(reference.jaccard_score(truth, predicted))


def test_masks_are_measured_at_their_own_resolution():
    output = torch.full((1, 1, 2, 2), -1.0)
    output[..., 0] = 1.0
    target = torch.tensor([[1, 1, 0, 0]], dtype=torch.uint8).expand(1, 4, 4)
    assert measured(LESION, output, target)["dice"] == 1.0


def test_a_class_without_pixels_is_left_out_and_no_foreground_at_all_is_undefined():
    target = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.uint8)
    output = torch.nn.functional.one_hot(target.long(), 3).permute(0, 3, 1, 2).float()
    assert measured(PETS, output, target)["dice"] == 1.0
    empty = torch.zeros_like(target)
    found = measured(LESION, torch.full((1, 1, 2, 2), -1.0), empty)
    assert math.isnan(found["dice"]) and math.isnan(found["iou"]) and found["pixel_accuracy"] == 1.0


CASES = {
    "classification": (classification(3), normal(9, 3), torch.arange(9) % 3, -7),
    "multilabel": (MULTILABEL, normal(9, 3), (normal(9, 3, seed=1) > 0).float(), math.nan),
    "regression": (REGRESSION, normal(9, 1), 40 + 12 * normal(9), math.nan),
    "masks": (PETS, normal(9, 3, 4, 4), (torch.arange(144).view(9, 4, 4) % 3).to(torch.uint8), 77),
}
every_kind = pytest.mark.parametrize("kind", CASES)


@every_kind
def test_samples_without_a_label_leave_no_trace(kind):
    task, output, target, nonsense = CASES[kind]
    labelled_B = torch.tensor([True, False, True, True, False, False, True, False, True])
    among_output, among_target = output.clone(), target.clone()
    among_output[~labelled_B], among_target[~labelled_B] = math.nan, nonsense
    assert measured(task, among_output, among_target, labelled_B) == measured(
        task, output[labelled_B], target[labelled_B]
    )


@every_kind
def test_metrics_without_a_label_are_undefined_and_quiet(kind):
    task, output, target, _ = CASES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (
            task.metrics().compute(),
            measured(task, output, target, torch.zeros(9, dtype=torch.bool)),
        ):
            assert values.pop("num_samples") == 0
            assert all(math.isnan(value) for value in values.values())


@every_kind
def test_metrics_go_on_after_compute_and_start_anew_after_reset(kind):
    task, output, target, _ = CASES[kind]
    labelled_B = torch.ones(9, dtype=torch.bool)
    metrics = task.metrics()
    metrics.update(output[:4], target[:4], labelled_B[:4])
    assert metrics.compute() == same(measured(task, output[:4], target[:4]))
    matrix = metrics.confusion_matrix()
    before = None if matrix is None else matrix.copy()
    metrics.update(output[4:], target[4:], labelled_B[4:])
    assert metrics.compute() == same(measured(task, output, target))
    assert np.array_equal(matrix, before)
    metrics.reset()
    metrics.update(output[4:], target[4:], labelled_B[4:])
    assert metrics.compute() == same(measured(task, output[4:], target[4:]))


@every_kind
def test_metrics_hold_no_gradient_graph(kind):
    task, output, target, _ = CASES[kind]
    metrics = task.metrics()
    metrics.update(output.clone().requires_grad_(), target, torch.ones(9, dtype=torch.bool))
    assert isinstance(metrics, Accumulator)
    for state in metrics.states().values():
        assert not any(tensor.requires_grad for tensor in (state if isinstance(state, list) else [state]))


def test_confusion_matrices_have_the_true_classes_in_rows():
    output, target = normal(60, 3), torch.arange(60) % 3
    metrics = classification(3).metrics()
    metrics.update(output, target, torch.ones(60, dtype=torch.bool))
    assert np.array_equal(
        metrics.confusion_matrix(), reference.confusion_matrix(target, output.argmax(dim=1))
    )
    pixels: TaskMetrics = PETS.metrics()
    _, maps, masks, _ = CASES["masks"]
    pixels.update(maps, masks, torch.ones(9, dtype=torch.bool))
    expected = reference.confusion_matrix(masks.flatten(), maps.argmax(dim=1).flatten())
    assert np.array_equal(pixels.confusion_matrix(), expected)
    assert REGRESSION.metrics().confusion_matrix() is None and MULTILABEL.metrics().confusion_matrix() is None


def gap_of_bins(p_N: np.ndarray, true_N: np.ndarray) -> float:
    """The expected calibration error as Guo et al. write it, a bin at a time."""
    gap = 0.0
    for low in range(15):
        inside = (p_N > low / 15) & (p_N <= (low + 1) / 15)
        if inside.any():
            gap += inside.mean() * abs(true_N[inside].mean() - p_N[inside].mean())
    return gap


@pytest.mark.parametrize("num_classes", [2, 5])
def test_calibration_brier_and_top_k_are_their_formulas_over_the_labelled_samples(num_classes):
    output, target = 2 * normal(300, num_classes), normal(300, seed=1).abs().long().clamp(max=num_classes - 1)
    labelled_B = normal(300, seed=2) > -0.5
    top_k = None if num_classes == 2 else 3
    info = TaskInfo("classification", tuple("abcde"[:num_classes]), 9, (3,) * num_classes)
    task = ClassificationSettings(top_k=top_k, **({"threshold": 0.9} if top_k is None else {})).build(
        "it", info
    )
    found = measured(task, output, target, labelled_B)
    p_NC, truth_N = output[labelled_B].double().softmax(dim=1).numpy(), target[labelled_B].numpy()
    assert found["ece"] == close(gap_of_bins(p_NC.max(axis=1), p_NC.argmax(axis=1) == truth_N))
    assert found["brier"] == close(((p_NC - np.eye(num_classes)[truth_N]) ** 2).sum(axis=1).mean())
    if top_k is None:
        assert found["brier"] == close(2 * reference.brier_score_loss(truth_N, p_NC[:, 1]))
        assert "top_k_accuracy" not in found and "top_k_accuracy" not in task.reported
    else:
        assert found["top_k_accuracy"] == close(
            reference.top_k_accuracy_score(truth_N, p_NC, k=3, labels=range(5))
        )
        assert "top_k_accuracy" in task.reported


def test_calibration_and_brier_of_labels_are_over_all_their_probabilities():
    output, target = 2 * normal(100, 3), (normal(100, 3, seed=1) > 0).float()
    found = measured(MULTILABEL, output, target)
    p_NC = output.double().sigmoid().numpy()
    assert found["ece"] == close(gap_of_bins(p_NC.ravel(), target.numpy().ravel()))
    assert found["brier"] == close(((p_NC - target.numpy()) ** 2).mean())


def test_of_more_than_ten_classes_the_top_five_are_counted_and_ties_are_no_hits():
    many = ClassificationSettings().build(
        "it", TaskInfo("classification", tuple("abcdefghijk"), 9, (1,) * 11)
    )
    target = torch.arange(11)
    assert measured(many, torch.zeros(11, 11), target)["top_k_accuracy"] == close(5 / 11)
    broken = measured(many, torch.full((11, 11), math.nan), target)
    assert broken["top_k_accuracy"] == 0 and math.isnan(broken["ece"])
    assert math.isnan(broken["brier"])


def test_a_top_k_of_all_classes_is_refused():
    with pytest.raises(UserError, match="fewer than the 3 classes, found 3"):
        ClassificationSettings(top_k=3).build("it", TaskInfo("classification", ("a", "b", "c"), 9, (3,) * 3))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_metrics_of_each_class_are_scikit_learns(num_classes):
    output, target = normal(90, num_classes), normal(90, seed=1).abs().long().clamp(max=num_classes - 1)
    labelled_B = normal(90, seed=2) > -0.5
    metrics = classification(num_classes).metrics()
    metrics.update(output, target, labelled_B)
    truth, predicted = target[labelled_B], output[labelled_B].argmax(dim=1)
    expected = reference.precision_recall_fscore_support(truth, predicted, labels=range(num_classes))
    assert metrics.per_class() == [
        close(dict(zip(("precision", "recall", "f1", "support"), row, strict=True)))
        for row in zip(*expected, strict=True)
    ]


def test_metrics_of_each_label_are_scikit_learns():
    output, target = normal(60, 3), (normal(60, 3, seed=1) > 0.5).float()
    metrics = MULTILABEL.metrics()
    metrics.update(output, target, torch.ones(60, dtype=torch.bool))
    expected = reference.precision_recall_fscore_support(target.numpy(), (output > 0).numpy())
    found = [list(row.values()) for row in metrics.per_class()]
    assert found == [pytest.approx(row) for row in zip(*expected, strict=True)]


def test_metrics_of_each_class_of_masks_are_the_terms_of_the_splits_with_the_background():
    output, target = normal(6, 3, 5, 5), (normal(6, 5, 5, seed=1).abs().long().clamp(max=2)).to(torch.uint8)
    target[0, 0] = 255
    metrics = PETS.metrics()
    metrics.update(output, target, torch.ones(6, dtype=torch.bool))
    valid = target != 255
    truth, predicted = target[valid], output.argmax(dim=1)[valid]
    rows = metrics.per_class()
    assert [row["iou"] for row in rows] == close(reference.jaccard_score(truth, predicted, average=None))
    assert [row["dice"] for row in rows] == close(reference.f1_score(truth, predicted, average=None))
    assert [row["support"] for row in rows] == torch.bincount(truth).tolist()
    assert metrics.compute()["iou"] == close(np.mean([row["iou"] for row in rows[1:]]))


def test_a_class_that_nothing_is_of_has_undefined_metrics_and_one_never_predicted_precision_0():
    metrics = classification(3).metrics()
    output = torch.tensor([[2.0, 1.0, 0.0]] * 3)
    metrics.update(output, torch.tensor([0, 1, 1]), torch.ones(3, dtype=torch.bool))
    first, second, third = metrics.per_class()
    assert first == close({"precision": 1 / 3, "recall": 1.0, "f1": 0.5, "support": 1.0})
    assert second == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2.0}
    assert third.pop("support") == 0 and all(math.isnan(value) for value in third.values())


@pytest.mark.parametrize("settings", [ClassificationSettings(), MultilabelSettings()])
def test_calibration_and_brier_do_not_depend_on_order_or_parts(settings):
    """To the bit: a run that was stopped reports what it would have reported."""
    task = settings.build("it", TaskInfo(settings.kind, tuple("abc"), 27, class_counts=(9, 9, 9)))
    output, labels = normal(200, 3), normal(200, seed=1).abs().long().clamp(max=2)
    target = labels if settings.kind == "classification" else torch.eye(3)[labels]
    in_order = torch.arange(200)
    found = set()
    for parts, order in ((1, in_order), (7, in_order), (50, normal(200, seed=2).argsort())):
        metrics = task.metrics()
        for rows in order.chunk(parts):
            metrics.update(output[rows], target[rows], torch.ones(len(rows), dtype=torch.bool))
        values = metrics.compute()
        found.add((values["ece"], values["brier"]))
    assert len(found) == 1
