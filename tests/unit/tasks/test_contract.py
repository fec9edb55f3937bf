"""What every task promises, whatever its kind and loss."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.registry import TaskSettings, build_tasks
from mtl_dist.tasks.task import Task

SETTINGS: TypeAdapter[Any] = TypeAdapter(TaskSettings)

INFOS = {
    "classification": TaskInfo("classification", ("a", "b", "c"), 10, (5, 3, 2)),
    "multilabel": TaskInfo("multilabel", ("a", "b", "c"), 10, (5, 9, 2)),
    "regression": TaskInfo(
        "regression", (), 10, (), mean=40.0, std=12.0, minimum=1.0, maximum=90.0, unit="years"
    ),
    "points": TaskInfo("keypoints", ("a", "b", "c"), 10, (5, 9, 2)),
    "points of numbers": TaskInfo("keypoints", ("a", "b", "c"), 10, (5, 9, 2)),
    "masks of two": TaskInfo("segmentation", ("background", "lesion"), 10, (900, 100)),
    "masks of three": TaskInfo("segmentation", ("background", "cat", "border"), 10, (700, 200, 100)),
}

LOSSES = {
    "classification": [
        {"kind": "cross_entropy"},
        {"kind": "cross_entropy", "label_smoothing": 0.1, "class_weights": "balanced"},
        {"kind": "cross_entropy", "logit_adjustment": 0.5},
        {"kind": "focal", "gamma": 2.0},
        {"kind": "focal", "gamma": 0.5, "class_weights": (1.0, 0.0, 3.0)},
    ],
    "multilabel": [{"kind": "bce"}, {"kind": "bce", "pos_weight": "balanced"}],
    "regression": [
        {"kind": "mse"},
        {"kind": "l1"},
        {"kind": "smooth_l1", "beta": 0.5},
        {"kind": "huber", "delta": 0.5},
        {"kind": "quantile"},
        {"kind": "gaussian_nll"},
        {"kind": "gaussian_nll", "beta": 0.5, "floor": 0.1},
    ],
    "points": [{"kind": "l1"}, {"kind": "smooth_l1", "beta": 0.1}],
    "points of numbers": [{"kind": "l1"}, {"kind": "mse"}],
    "masks of two": [
        {"kind": "cross_entropy", "class_weights": "balanced"},
        {"kind": "bce"},
        {"kind": "bce", "boundary": {"width": 3}},
        {"kind": "dice"},
        {"kind": "bce_dice", "bce_weight": 0.5, "dice_weight": 2.0},
    ],
    "masks of three": [
        {"kind": "cross_entropy"},
        {"kind": "cross_entropy", "logit_adjustment": True},
        {"kind": "cross_entropy", "boundary": {"weight": 2.0, "width": 5}, "class_weights": "balanced"},
        {"kind": "dice", "smooth": 0.1},
    ],
}

CASES = [(which, loss) for which, losses in LOSSES.items() for loss in losses]
every_loss = pytest.mark.parametrize(
    ("which", "loss"), CASES, ids=[f"{which}-{loss['kind']}-{i}" for i, (which, loss) in enumerate(CASES)]
)


def build(which: str, loss: dict[str, Any] | None = None) -> Task:
    info = INFOS[which]
    raw = {"kind": info.kind} | ({"loss": loss} if loss else {})
    raw |= {"head": "regression"} if which == "points of numbers" else {}
    return build_tasks({"it": SETTINGS.validate_python(raw)}, {"it": info})["it"]


@every_loss
def test_a_task_is_built_of_what_the_recipe_of_a_run_states_of_it(which, loss):
    task = build(which, loss)
    stated = SETTINGS.validate_json(task.settings.model_dump_json())
    again = build_tasks({"it": stated}, {"it": INFOS[which]})["it"]
    assert again.settings == task.settings and again.head == task.head


def random_batch(task: Task, num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, targets and labelled flags; maps come at half the masks' resolution."""
    key = torch.Generator().manual_seed(seed)
    num_outputs = task.head.num_outputs
    num_classes = len(task.info.classes)
    output = 3 * torch.randn(num, num_outputs, *([4, 5] if task.head.layout == "map" else []), generator=key)
    labelled_B = torch.rand(num, generator=key) > 0.3
    match task.info.kind:
        case "classification":
            target = torch.randint(num_classes, (num,), generator=key)
        case "multilabel":
            target = torch.randint(2, (num, num_classes), generator=key).float()
        case "regression":
            target = 40 + 12 * torch.randn(num, generator=key)
        case "keypoints":
            target = 2 * torch.rand(num, num_classes + 3, 3, generator=key) - 1
            target[:, :-3, 2] = torch.randint(3, (num, num_classes), generator=key)
            target[:, 0, 2] = 2
        case "segmentation":
            target = torch.randint(num_classes, (num, 8, 10), generator=key).to(torch.uint8)
            target[torch.rand(num, 8, 10, generator=key) > 0.7] = 255
    return output, target, labelled_B


@every_loss
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_the_sum_and_the_count_of_a_union_of_batches_are_the_sums_of_theirs(which, loss, sizes, seed):
    task = build(which, loss)
    output, target, labelled_B = random_batch(task, sum(sizes), seed)
    parts = list(zip(output.split(sizes), target.split(sizes), labelled_B.split(sizes), strict=True))
    loss_sum = sum(float(task.loss_sum(*part)) for part in parts)
    count = sum(float(task.count(*part[1:])) for part in parts)
    assert float(task.loss_sum(output, target, labelled_B)) == pytest.approx(loss_sum, rel=1e-5, abs=1e-6)
    assert float(task.count(target, labelled_B)) == pytest.approx(count, rel=1e-6)


@every_loss
def test_a_sample_without_a_label_changes_neither_value_nor_gradient(which, loss):
    task = build(which, loss)
    output, target, _ = random_batch(task, 6, seed=1)
    labelled_B = torch.tensor([True, False, True, False, False, True])
    alone = output[labelled_B].requires_grad_()
    expected = task.loss_sum(alone, target[labelled_B], labelled_B[labelled_B])
    expected.backward()

    for nonsense in (1e30, math.inf, -math.inf, math.nan):
        among = output.clone()
        among[~labelled_B] = nonsense
        among.requires_grad_()
        loss_sum = task.loss_sum(among, spoilt(target, ~labelled_B), labelled_B)
        loss_sum.backward()
        torch.testing.assert_close(loss_sum, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(among.grad[labelled_B], alone.grad, rtol=1e-6, atol=1e-9)
        assert torch.equal(among.grad[~labelled_B], torch.zeros_like(output[~labelled_B]))
        assert task.count(spoilt(target, ~labelled_B), labelled_B) == task.count(
            target[labelled_B], labelled_B[labelled_B]
        )


def spoilt(target: Tensor, where_B: Tensor) -> Tensor:
    """The target with values that no label has at the chosen samples."""
    target = target.clone()
    target[where_B] = {torch.int64: -7, torch.uint8: 77, torch.float32: math.nan}[target.dtype]
    return target


@every_loss
@pytest.mark.parametrize("num", [0, 3])
def test_a_batch_without_labels_has_a_loss_and_a_gradient_of_exactly_zero(which, loss, num):
    task = build(which, loss)
    output, target, _ = random_batch(task, num, seed=2)
    output.requires_grad_()
    labelled_B = torch.zeros(num, dtype=torch.bool)
    loss_sum = task.loss_sum(output, target, labelled_B)
    loss_sum.backward()
    assert loss_sum == 0 and task.count(target, labelled_B) == 0
    assert torch.equal(output.grad, torch.zeros_like(output))


@every_loss
def test_the_loss_is_float32_under_autocast_and_for_bfloat16_outputs(which, loss):
    task = build(which, loss)
    output, target, labelled_B = random_batch(task, 5, seed=3)
    rough = output.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = task.loss_sum(rough, target, labelled_B)
    assert under_autocast.dtype == torch.float32 and under_autocast.dim() == 0
    assert torch.equal(under_autocast, task.loss_sum(rough.float(), target, labelled_B))
    count = task.count(target, labelled_B)
    assert count.dtype == torch.float32 and count.dim() == 0


@every_loss
def test_huge_outputs_give_finite_losses_and_gradients(which, loss):
    task = build(which, loss)
    output, target, labelled_B = random_batch(task, 5, seed=4)
    huge = (1e4 * output).requires_grad_()
    loss_sum = task.loss_sum(huge, target, labelled_B)
    loss_sum.backward()
    assert bool(loss_sum.isfinite()) and bool(huge.grad.isfinite().all())


@every_loss
def test_following_the_gradient_lowers_the_loss_to_near_its_minimum(which, loss):
    task = build(which, loss)
    output, target, _ = random_batch(task, 4, seed=5)
    labelled_B = torch.ones(4, dtype=torch.bool)
    if task.head.layout == "map":
        output = torch.nn.functional.interpolate(output, size=(8, 10))
    output.requires_grad_()
    optimizer = torch.optim.Adam([output], lr=0.3)
    first = (task.loss_sum(output, target, labelled_B) / task.count(target, labelled_B)).item()
    for _ in range(60):
        optimizer.zero_grad()
        (task.loss_sum(output, target, labelled_B) / task.count(target, labelled_B)).backward()
        optimizer.step()
    last = (task.loss_sum(output, target, labelled_B) / task.count(target, labelled_B)).item()
    floor = 0.5 if loss.get("label_smoothing") else 0.05
    assert last < max(floor, 0.1 * first)


@pytest.mark.parametrize("which", INFOS)
def test_metrics_and_predictions_are_plain_numbers(which):
    task = build(which)
    output, target, labelled_B = random_batch(task, 6, seed=6)
    metrics = task.metrics()
    metrics.update(output, target, labelled_B)
    values = metrics.compute()
    assert all(type(value) is float for value in values.values())
    assert values["num_samples"] == int(labelled_B.sum())
    assert len(task.decode(output)) == 6
