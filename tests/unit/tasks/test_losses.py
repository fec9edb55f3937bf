"""The losses have torch's and the papers' values."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.errors import UserError
from mtl_dist.specs import HeadSpec, TaskInfo
from mtl_dist.tasks.registry import TaskSettings, build_tasks
from mtl_dist.tasks.task import Task

SETTINGS: TypeAdapter[Any] = TypeAdapter(TaskSettings)

THREE = TaskInfo("classification", ("a", "b", "c"), 10, (5, 3, 2))
LABELS = TaskInfo("multilabel", ("a", "b", "c"), 10, (5, 2, 0))
AGE = TaskInfo("regression", (), 10, (), mean=40.0, std=12.0, unit="years")
LESION = TaskInfo("segmentation", ("background", "lesion"), 4, (300, 100))
PETS = TaskInfo("segmentation", ("background", "cat", "border"), 4, (200, 100, 100))


def build(info: TaskInfo, **loss: Any) -> Task:
    raw: dict[str, Any] = {"kind": info.kind}
    if loss:
        raw["loss"] = loss
    return build_tasks({"it": SETTINGS.validate_python(raw)}, {"it": info})["it"]


def mean_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    labelled_B = torch.ones(len(target), dtype=torch.bool)
    return task.loss_sum(output, target, labelled_B) / task.count(target, labelled_B)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 4.0)])
def test_cross_entropy_is_torchs(smoothing, weights):
    output, target = logits(20, 3), torch.arange(20) % 3
    task = build(THREE, kind="cross_entropy", label_smoothing=smoothing, class_weights=weights)
    weight = torch.tensor(weights) if weights else None
    expected = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)(output, target)
    torch.testing.assert_close(mean_loss(task, output, target), expected, rtol=1e-6, atol=0)


def test_balanced_class_weights_are_inverse_frequencies_with_mean_one_over_the_labels():
    task = build(THREE, kind="cross_entropy", class_weights="balanced")
    target = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert task.count(target, torch.ones(10, dtype=torch.bool)) == pytest.approx(10.0)
    expected = nn.CrossEntropyLoss(torch.tensor([10 / 15, 10 / 9, 10 / 6]))(logits(10, 3), target)
    torch.testing.assert_close(mean_loss(task, logits(10, 3), target), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("counts", [(), (0, 0, 0)])
def test_balanced_weights_of_a_task_without_labels_are_ones(counts):
    target = torch.tensor([0, 1, 2])
    for kind, loss in (("classification", "cross_entropy"), ("classification", "focal")):
        task = build(TaskInfo(kind, ("a", "b", "c"), 0, counts), kind=loss, class_weights="balanced")
        assert task.count(target, torch.ones(3, dtype=torch.bool)) == 3
    task = build(TaskInfo("multilabel", ("a", "b", "c"), 0, counts), kind="bce", pos_weight="balanced")
    target = torch.tensor([[1.0, 0.0, 1.0]])
    torch.testing.assert_close(
        mean_loss(task, logits(1, 3), target), nn.BCEWithLogitsLoss()(logits(1, 3), target)
    )


def test_a_class_that_does_not_occur_has_the_balanced_weight_one():
    task = build(
        TaskInfo("classification", ("a", "b", "c"), 8, (6, 0, 2)), kind="focal", class_weights="balanced"
    )
    every = torch.ones(1, dtype=torch.bool)
    counts = [task.count(torch.tensor([c]), every).item() for c in range(3)]
    assert counts == pytest.approx([8 / 12, 1.0, 8 / 4])


@pytest.mark.parametrize("beta", [None, 0.0, 0.9])
def test_effective_weights_are_the_papers_with_mean_one_over_the_labels(beta):
    counts_C = torch.tensor([500, 30, 2])
    stated = 0.999 if beta is None else beta
    paper_C = (1 - stated) / (1 - stated ** counts_C.double())
    paper_C = (paper_C * counts_C.sum() / (paper_C * counts_C).sum()).float()
    info = TaskInfo("classification", ("a", "b", "c"), 532, tuple(counts_C.tolist()))
    for kind in ("cross_entropy", "focal"):
        task = build(info, kind=kind, class_weights="effective", beta=beta)
        target = torch.tensor([0, 1, 2])
        torch.testing.assert_close(task.loss.denominators(target), paper_C, rtol=1e-6, atol=0)
    balanced = build(info, kind="focal", class_weights="balanced").loss.denominators(target)
    near_one = build(info, kind="focal", class_weights="effective", beta=1 - 1e-12)
    torch.testing.assert_close(near_one.loss.denominators(target), balanced, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("setting", "tau"), [(True, 1.0), (0.5, 0.5)])
def test_logit_adjustment_adds_log_priors_in_the_loss_and_a_class_never_seen_counts_once(setting, tau):
    prior_C = torch.tensor([6.0, 3.0, 1.0])
    added_C = tau * (prior_C / prior_C.sum()).log()
    info = TaskInfo("classification", ("a", "b", "c"), 9, (6, 3, 0))
    task = build(info, kind="cross_entropy", logit_adjustment=setting)
    output, target = logits(20, 3), torch.arange(20) % 3
    expected = nn.CrossEntropyLoss()(output + added_C, target)
    torch.testing.assert_close(mean_loss(task, output, target), expected, rtol=1e-6, atol=0)
    assert task.decode(output)[0]["confidence"] == pytest.approx(output[0].softmax(0).max().item())

    masks = TaskInfo("segmentation", ("background", "cat", "border"), 4, (6, 3, 0))
    task = build(masks, kind="cross_entropy", logit_adjustment=setting)
    maps, pixels = logits(2, 3, 4, 4), torch.arange(32).view(2, 4, 4).remainder(3).to(torch.uint8)
    pixels[0, 0] = 255
    expected = nn.CrossEntropyLoss(ignore_index=255)(maps + added_C[:, None, None], pixels.long())
    torch.testing.assert_close(mean_loss(task, maps, pixels), expected, rtol=1e-6, atol=0)


def test_logit_adjustment_of_a_task_without_labels_adds_nothing():
    task = build(TaskInfo("classification", ("a", "b")), kind="cross_entropy", logit_adjustment=True)
    output, target = logits(4, 2), torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(mean_loss(task, output, target), nn.CrossEntropyLoss()(output, target))


def test_focal_with_gamma_zero_is_cross_entropy():
    output, target = logits(20, 3), torch.arange(20) % 3
    task = build(THREE, kind="focal", gamma=0.0, class_weights=(1.0, 2.0, 3.0))
    expected = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))(output, target)
    torch.testing.assert_close(mean_loss(task, output, target), expected, rtol=1e-6, atol=0)


def test_focal_is_the_papers_formula():
    output, target = logits(20, 3).requires_grad_(), torch.arange(20) % 3
    p_B = output.softmax(dim=1)[torch.arange(20), target]
    expected = (-((1 - p_B) ** 2) * p_B.log()).mean()
    found = mean_loss(build(THREE, kind="focal", gamma=2.0), output, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, output), torch.autograd.grad(expected, output), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 4.0)])
def test_multilabel_bce_is_torchs(weights):
    output, target = logits(20, 3), (logits(20, 3, seed=1) > 0).float()
    task = build(LABELS, kind="bce", pos_weight=weights)
    pos_weight = torch.tensor(weights) if weights else None
    expected = nn.BCEWithLogitsLoss(pos_weight=pos_weight)(output, target)
    torch.testing.assert_close(mean_loss(task, output, target), expected, rtol=1e-6, atol=0)
    assert task.count(target, torch.ones(20, dtype=torch.bool)) == 20


def test_balanced_positive_weights_are_negatives_over_positives_and_one_for_a_label_never_seen():
    output, target = logits(20, 3), (logits(20, 3, seed=1) > 0).float()
    expected = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 4.0, 1.0]))(output, target)
    found = mean_loss(build(LABELS, kind="bce", pos_weight="balanced"), output, target)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        ({"kind": "mse"}, nn.MSELoss()),
        ({"kind": "l1"}, nn.L1Loss()),
        ({"kind": "smooth_l1", "beta": 0.3}, nn.SmoothL1Loss(beta=0.3)),
    ],
)
def test_regression_losses_are_torchs_on_the_standardised_target(loss, reference):
    output, target = logits(20, 1), 40 + 12 * logits(20, seed=1)
    expected = reference(output[:, 0], (target - 40) / 12)
    torch.testing.assert_close(mean_loss(build(AGE, **loss), output, target), expected, rtol=1e-6, atol=0)


def test_without_standardising_the_target_is_learnt_in_its_unit():
    settings = SETTINGS.validate_python({"kind": "regression", "standardise": False})
    task = build_tasks({"it": settings}, {"it": AGE})["it"]
    output, target = torch.tensor([[39.0]]), torch.tensor([41.0])
    assert mean_loss(task, output, target) == 4
    assert task.decode(output) == [{"value": 39.0, "unit": "years"}]


def test_a_constant_target_is_centred_and_not_scaled():
    task = build(TaskInfo("regression", (), 5, (), mean=7.0, std=0.0), kind="l1")
    assert mean_loss(task, torch.tensor([[0.5]]), torch.tensor([7.0])) == 0.5
    assert task.decode(torch.tensor([[0.5]]))[0]["value"] == 7.5


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 4.0)])
def test_map_cross_entropy_is_torchs_with_255_ignored(weights):
    output = logits(4, 3, 5, 6)
    target = torch.randint(3, (4, 5, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    target[:, :2, :3] = 255
    task = build(PETS, kind="cross_entropy", class_weights=weights)
    weight = torch.tensor(weights) if weights else None
    expected = nn.CrossEntropyLoss(weight, ignore_index=255)(output, target.long())
    torch.testing.assert_close(mean_loss(task, output, target), expected, rtol=1e-6, atol=0)


def test_map_bce_is_torchs_over_the_labelled_pixels():
    output = logits(4, 1, 5, 6)
    target = (logits(4, 5, 6, seed=1) > 0).to(torch.uint8)
    target[:, :2, :3] = 255
    valid = target != 255
    expected = nn.BCEWithLogitsLoss()(output[:, 0][valid], target[valid].float())
    torch.testing.assert_close(
        mean_loss(build(LESION, kind="bce"), output, target), expected, rtol=1e-6, atol=0
    )


def dice_by_hand(p: Tensor, true: Tensor, smooth: float) -> Tensor:
    return (2 * (p * true).sum() + smooth) / (p.sum() + true.sum() + smooth)


def test_dice_of_two_classes_is_that_of_the_foreground_averaged_over_samples():
    output = logits(3, 1, 5, 6)
    target = (logits(3, 5, 6, seed=1) > 0).to(torch.uint8)
    target[0, :2] = 255
    target[2] = 255
    losses = []
    for b in range(2):
        valid = target[b] != 255
        losses.append(1 - dice_by_hand(output[b, 0][valid].sigmoid(), target[b][valid].float(), smooth=0.5))
    task = build(LESION, kind="dice", smooth=0.5)
    torch.testing.assert_close(mean_loss(task, output, target), torch.stack(losses).mean(), rtol=1e-6, atol=0)
    assert task.count(target, torch.ones(3, dtype=torch.bool)) == 2


def test_dice_of_more_classes_averages_them_all():
    output = logits(2, 3, 5, 6)
    target = torch.randint(3, (2, 5, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    target[0, :2] = 255
    losses = []
    for b in range(2):
        valid = target[b] != 255
        p = output[b].softmax(dim=0)[:, valid]
        losses.append(1 - sum(dice_by_hand(p[c], (target[b][valid] == c).float(), 1.0) for c in range(3)) / 3)
    found = mean_loss(build(PETS, kind="dice"), output, target)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-6, atol=0)


def test_bce_dice_is_the_weighted_sum_of_both_per_sample():
    output = logits(2, 1, 5, 6)
    target = (logits(2, 5, 6, seed=1) > 0).to(torch.uint8)
    target[0, :2] = 255
    bce = [mean_loss(build(LESION, kind="bce"), output[b : b + 1], target[b : b + 1]) for b in range(2)]
    dice = mean_loss(build(LESION, kind="dice"), output, target)
    found = mean_loss(build(LESION, kind="bce_dice", bce_weight=0.5, dice_weight=2.0), output, target)
    torch.testing.assert_close(found, 0.5 * sum(bce) / 2 + 2 * dice, rtol=1e-6, atol=0)


def boundary_weights_by_hand(target: Tensor, weight: float, width: int) -> Tensor:
    weights = torch.zeros(target.shape)
    for y in range(target.shape[0]):
        for x in range(target.shape[1]):
            if target[y, x] == 255:
                continue
            low = [max(0, at - width // 2) for at in (y, x)]
            around = target[low[0] : y + width // 2 + 1, low[1] : x + width // 2 + 1]
            labelled = around[around != 255]
            weights[y, x] = 1 + weight * (labelled != target[y, x]).float().mean()
    return weights


@pytest.mark.parametrize("width", [3, 5, 31])
@pytest.mark.parametrize(
    ("info", "kind", "classes"),
    [(PETS, "cross_entropy", (1.0, 3.0, 0.5)), (LESION, "cross_entropy", None), (LESION, "bce", None)],
)
def test_a_pixel_weighs_more_by_the_share_of_other_classes_around_it(
    info: TaskInfo, kind: str, classes: tuple[float, ...] | None, width: int
):
    num = 1 if kind == "bce" else len(info.classes)
    output = logits(2, num, 6, 9)
    target = torch.randint(len(info.classes), (2, 6, 9), generator=torch.Generator().manual_seed(3))
    target = target.to(torch.uint8)
    target[0, :2], target[1, 3, 3] = 255, 255
    weights = torch.stack([boundary_weights_by_hand(each, 4.0, width) for each in target])
    if classes is not None:
        weights = weights * torch.tensor((*classes, *[0.0] * 253))[target.long()]
    if num == 1:
        losses = F.binary_cross_entropy_with_logits(output[:, 0], (target == 1).float(), reduction="none")
    else:
        losses = F.cross_entropy(output, target.long(), ignore_index=255, reduction="none")
    more = {} if classes is None else {"class_weights": classes}
    task = build(info, kind=kind, boundary={"weight": 4.0, "width": width}, **more)
    expected = (losses * weights).sum() / weights.sum()
    torch.testing.assert_close(mean_loss(task, output, target), expected, rtol=1e-5, atol=0)


def test_boundary_weights_of_one_class_alone_change_nothing_and_of_bce_dice_are_those_of_its_bce():
    output, target = logits(2, 1, 5, 6), torch.ones(2, 5, 6, dtype=torch.uint8)
    target[0, 0] = 255
    for kind in ("bce", "bce_dice"):
        plain, weighed = build(LESION, kind=kind), build(LESION, kind=kind, boundary={})
        same = mean_loss(plain, output, target)
        torch.testing.assert_close(mean_loss(weighed, output, target), same, rtol=1e-6, atol=0)
    target[:, 2:] = 0
    settings = {"boundary": {"weight": 2, "width": 3}}
    bce = [
        mean_loss(build(LESION, kind="bce", **settings), output[b : b + 1], target[b : b + 1]) for b in (0, 1)
    ]
    dice = mean_loss(build(LESION, kind="dice"), output, target)
    found = mean_loss(build(LESION, kind="bce_dice", **settings), output, target)
    torch.testing.assert_close(found, sum(bce) / 2 + dice, rtol=1e-6, atol=0)


def test_an_even_width_of_boundaries_has_no_centre():
    with pytest.raises(ValidationError, match="expected an odd number of pixels"):
        build(LESION, kind="bce", boundary={"width": 4})


def tversky_by_hand(p: Tensor, true: Tensor, alpha: float, beta: float, smooth: float) -> Tensor:
    hits, wrong, missed = (p * true).sum(), (p * (1 - true)).sum(), ((1 - p) * true).sum()
    return 1 - (hits + smooth) / (hits + alpha * wrong + beta * missed + smooth)


@pytest.mark.parametrize(
    ("loss", "alpha", "beta", "gamma"),
    [
        ({"kind": "tversky", "alpha": 0.2, "beta": 0.8}, 0.2, 0.8, 1.0),
        ({"kind": "tversky", "gamma": 0.75}, 0.3, 0.7, 0.75),
        ({"kind": "jaccard"}, 1.0, 1.0, 1.0),
    ],
)
@pytest.mark.parametrize("info", [LESION, PETS])
def test_tversky_and_jaccard_are_their_formulas_over_each_samples_labelled_pixels(
    info: TaskInfo, loss: dict[str, Any], alpha: float, beta: float, gamma: float
):
    num = 1 if info is LESION else 3
    output = logits(3, num, 5, 6)
    target = torch.randint(len(info.classes), (3, 5, 6), generator=torch.Generator().manual_seed(1))
    target = target.to(torch.uint8)
    target[0, :2], target[2] = 255, 255
    losses = []
    for b in range(2):
        valid = target[b] != 255
        p = output[b].sigmoid() if num == 1 else output[b].softmax(dim=0)
        classes = [1] if num == 1 else range(3)
        own = [
            tversky_by_hand(p[n][valid], (target[b][valid] == c).float(), alpha, beta, 1.0) ** gamma
            for n, c in enumerate(classes)
        ]
        losses.append(sum(own) / len(own))
    found = mean_loss(build(info, **loss), output, target)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def lovasz_by_hand(errors: Tensor, true: Tensor) -> Tensor:
    """The Choquet integral of 1 - IoU: pixels become wrong one after another, the largest error first."""
    order = errors.argsort(descending=True)
    total, before, wrong = torch.zeros(()), 0.0, torch.zeros_like(true, dtype=torch.bool)
    for pixel in order:
        wrong[pixel] = True
        hits = (true & ~wrong).sum()
        index = 1 - hits / (true.sum() + (wrong & ~true).sum())
        total = total + errors[pixel].clamp(min=0) * (index - before)
        before = index
    return total


@pytest.mark.parametrize("info", [LESION, PETS])
def test_lovasz_is_the_convex_extension_of_the_iou_of_each_sample(info: TaskInfo):
    num = 1 if info is LESION else 3
    output = logits(3, num, 3, 4)
    target = torch.randint(len(info.classes), (3, 3, 4), generator=torch.Generator().manual_seed(1))
    target = target.to(torch.uint8)
    target[0, :1], target[2] = 255, 255
    losses = []
    for b in range(2):
        valid = target[b] != 255
        true = target[b][valid]
        if num == 1:
            signs = torch.where(true == 1, 1.0, -1.0)
            losses.append(lovasz_by_hand(1 - output[b, 0][valid] * signs, true == 1))
            continue
        p = output[b].softmax(dim=0)[:, valid]
        there = [c for c in range(3) if (true == c).any()]
        own = [lovasz_by_hand(torch.where(true == c, 1 - p[c], p[c]), true == c) for c in there]
        losses.append(sum(own) / len(own))
    found = mean_loss(build(info, kind="lovasz"), output, target)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["tversky", "jaccard", "lovasz"])
@pytest.mark.parametrize("info", [LESION, PETS])
def test_overlap_losses_have_finite_gradients_where_all_is_right_or_nothing_is_labelled(
    info: TaskInfo, loss: str
):
    num = 1 if info is LESION else 3
    target = torch.zeros(2, 4, 4, dtype=torch.uint8)
    target[1] = 255
    output = torch.full((2, num, 4, 4), -50.0)
    output[:, 0] = 50.0 if num == 3 else -50.0
    output.requires_grad_()
    value = mean_loss(
        build(info, kind=loss, **({"gamma": 0.75} if loss == "tversky" else {})), output, target
    )
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert output.grad.isfinite().all()
    assert not output.grad[1].any()


def test_an_empty_mask_predicted_empty_has_no_dice_loss():
    task = build(LESION, kind="dice")
    found = mean_loss(task, torch.full((1, 1, 4, 4), -50.0), torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert found == pytest.approx(0, abs=1e-6)


def test_logits_at_another_resolution_are_upsampled_to_the_mask():
    output, target = logits(2, 1, 4, 5), (logits(2, 8, 10, seed=1) > 0).to(torch.uint8)
    upsampled = nn.functional.interpolate(output, size=(8, 10), mode="bilinear", align_corners=False)
    task = build(LESION, kind="bce_dice")
    assert torch.equal(mean_loss(task, output, target), mean_loss(task, upsampled, target))


def test_what_lies_at_ignored_pixels_changes_nothing():
    output = logits(2, 1, 4, 4)
    target = torch.ones(2, 4, 4, dtype=torch.uint8)
    target[:, 0] = 255
    for loss in ("bce", "dice", "bce_dice"):
        task = build(LESION, kind=loss)
        spoilt = output.clone()
        spoilt[:, :, 0] = float("nan")
        spoilt.requires_grad_()
        found = mean_loss(task, spoilt, target)
        found.backward()
        assert torch.equal(found, mean_loss(task, output, target))
        assert bool(spoilt.grad.isfinite().all()) and bool((spoilt.grad[:, :, 0] == 0).all())


@pytest.mark.parametrize(
    ("info", "loss", "head"),
    [
        (THREE, {"kind": "focal"}, HeadSpec("it", "vector", 3)),
        (LABELS, {"kind": "bce"}, HeadSpec("it", "vector", 3)),
        (AGE, {"kind": "mse"}, HeadSpec("it", "vector", 1)),
        (LESION, {"kind": "cross_entropy"}, HeadSpec("it", "map", 2)),
        (LESION, {"kind": "bce"}, HeadSpec("it", "map", 1)),
        (LESION, {"kind": "dice"}, HeadSpec("it", "map", 1)),
        (LESION, {"kind": "bce_dice"}, HeadSpec("it", "map", 1)),
        (PETS, {"kind": "dice"}, HeadSpec("it", "map", 3)),
        (PETS, {"kind": "cross_entropy"}, HeadSpec("it", "map", 3)),
    ],
)
def test_each_loss_asks_for_the_head_it_needs(info, loss, head):
    assert build(info, **loss).head == head


@pytest.mark.parametrize(
    ("info", "loss", "message"),
    [
        (
            THREE,
            {"kind": "cross_entropy", "class_weights": (1.0, 2.0)},
            "tasks.it.loss.class_weights: expected 3 weights, one for each of a, b, c, found 2",
        ),
        (
            THREE,
            {"kind": "focal", "class_weights": (0.0, 0.0, 0.0)},
            "tasks.it.loss.class_weights: expected a weight > 0",
        ),
        (LABELS, {"kind": "bce", "pos_weight": (1.0,)}, "tasks.it.loss.pos_weight: expected 3 weights"),
        (
            TaskInfo("classification", ("a", "b"), 5, (5,)),
            {"kind": "focal", "class_weights": "balanced"},
            "tasks.it.loss.class_weights: expected label counts of 2 classes in the dataset, found 1",
        ),
        (
            THREE,
            {"kind": "focal", "class_weights": "balanced", "beta": 0.9},
            "tasks.it.loss.beta: expected class_weights: effective, which it is of, found balanced",
        ),
        (
            PETS,
            {"kind": "cross_entropy", "class_weights": "effective"},
            "tasks.it.loss.class_weights: expected a beta beside effective, where pixels are counted",
        ),
        (
            TaskInfo("classification", ("a", "b"), 5, (5,)),
            {"kind": "cross_entropy", "logit_adjustment": True},
            "tasks.it.loss.logit_adjustment: expected label counts of 2 classes",
        ),
        (PETS, {"kind": "bce"}, "tasks.it.loss.kind: expected cross_entropy or dice for masks of 3 classes"),
        (PETS, {"kind": "bce_dice"}, "found bce_dice, which is for two classes"),
        (
            LESION,
            {"kind": "bce_dice", "bce_weight": 0.0, "dice_weight": 0.0},
            "expected a weight > 0, found both 0",
        ),
        (
            TaskInfo("classification", ("a",), 5, (5,)),
            {},
            "expected 2 or more classes in the dataset, found 1 (a)",
        ),
        (TaskInfo("multilabel"), {}, "tasks.it: expected 1 or more classes"),
        (TaskInfo("segmentation", ("ink",), 5, (5,)), {}, "tasks.it: expected 2 or more classes"),
    ],
)
def test_settings_that_do_not_fit_the_dataset_are_one_clear_line(info, loss, message):
    with pytest.raises(UserError) as raised:
        build(info, **loss)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "raw",
    [
        {"kind": "classification", "weight": -1.0},
        {"kind": "classification", "loss": {"kind": "cross_entropy", "label_smoothing": 1.5}},
        {"kind": "classification", "loss": {"kind": "cross_entropy", "class_weights": (-1.0, 1.0)}},
        {"kind": "classification", "loss": {"kind": "cross_entropy", "logit_adjustment": -1.0}},
        {"kind": "classification", "loss": {"kind": "cross_entropy", "beta": 1.0}},
        {"kind": "classification", "loss": {"kind": "mse"}},
        {"kind": "regression", "loss": {"kind": "smooth_l1", "beta": 0.0}},
        {"kind": "segmentation", "loss": {"kind": "dice", "smooth": 0.0}},
        {"kind": "regresion"},
        {"kind": "regression", "classes": 3},
    ],
)
def test_settings_out_of_range_are_refused(raw):
    with pytest.raises(ValidationError):
        SETTINGS.validate_python(raw)


def test_a_recipes_lists_fill_the_weights():
    settings = SETTINGS.validate_json(
        '{"kind": "classification", "weight": 2, "loss": {"kind": "focal", "class_weights": [1, 2.5, 0]}}'
    )
    assert settings.weight == 2 and settings.loss.class_weights == (1.0, 2.5, 0.0)
