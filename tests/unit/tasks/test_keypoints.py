"""Points are learnt and measured as an independent float64 implementation has it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.keypoints import KeypointsSettings, KeypointsTask, soft_argmax

NAMES = ("left_eye", "right_eye", "nose", "chin")
INFO = TaskInfo(
    "keypoints",
    NAMES,
    40,
    (9, 8, 7, 0),
    facts={"positions": [[9, 0.3, -0.2], [8, -0.31, 0.9], [7, 0, 0], [0, 0, 0]]},
)


def task_of(**settings: Any) -> KeypointsTask:
    task = KeypointsSettings.model_validate(settings, strict=False).build("face", INFO)
    assert isinstance(task, KeypointsTask)
    return task


def batch(seed: int = 0, num: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of images of several sizes and proportions, and which samples are labelled."""
    random = np.random.default_rng(seed)
    target = np.zeros((num, len(NAMES) + 3, 3), np.float32)
    target[:, :-3, :2] = random.uniform(-0.9, 0.9, (num, len(NAMES), 2))
    target[:, :-3, 2] = random.integers(0, 3, (num, len(NAMES)))
    target[:, :-3] *= target[:, :-3, 2:] > 0
    sizes = random.integers(20, 90, (num, 2))
    target[:, -3, [0, 2]] = sizes[:, :1] / 2
    target[:, -2, [1, 2]] = sizes[:, 1:] / 2
    target[:, -3:-1, 2] -= 0.5
    target[:, -1, :2] = sizes
    return torch.from_numpy(target), torch.from_numpy(random.uniform(size=num) > 0.2)


def heatmaps(seed: int, num: int = 7, size: tuple[int, int] = (9, 13)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (num, len(NAMES), *size))).float()


def centroids(maps: np.ndarray) -> np.ndarray:
    """The mean place of each softmax, by a loop over its cells."""
    places = np.zeros((*maps.shape[:2], 2))
    height, width = maps.shape[-2:]
    for b, k in np.ndindex(maps.shape[:2]):
        shares = np.exp(maps[b, k] - maps[b, k].max())
        shares /= shares.sum()
        for i, j in np.ndindex(height, width):
            places[b, k] += shares[i, j] * np.array([(j + 0.5) / width * 2 - 1, (i + 0.5) / height * 2 - 1])
    return places


def wanted_shares(place: np.ndarray, size: tuple[int, int], sigma: float) -> np.ndarray:
    height, width = size
    shares = np.zeros(size)
    for i, j in np.ndindex(height, width):
        x, y = (place[0] + 1) / 2 * width - 0.5, (place[1] + 1) / 2 * height - 0.5
        shares[i, j] = math.exp(-((i - y) ** 2 + (j - x) ** 2) / (2 * sigma**2))
    return shares / shares.sum()


def test_the_mean_place_of_a_map_is_that_of_its_softmax() -> None:
    maps = heatmaps(1)
    np.testing.assert_allclose(
        soft_argmax(maps.double()).numpy(), centroids(maps.double().numpy()), atol=1e-12
    )


@pytest.mark.parametrize("kind", ["l1", "mse", "smooth_l1"])
def test_the_loss_of_coordinates_is_over_the_labelled_points(kind: str) -> None:
    task = task_of(head="regression", loss={"kind": kind})
    target, labelled_B = batch()
    output = torch.from_numpy(np.random.default_rng(3).normal(0, 1, (7, 8))).float()
    total, count = 0.0, 0
    for b, k in np.ndindex(7, 4):
        if labelled_B[b] and target[b, k, 2] > 0:
            apart = np.abs(output.view(7, 4, 2)[b, k].double().numpy() - target[b, k, :2].double().numpy())
            if kind == "smooth_l1":
                each = np.where(apart < 0.05, apart**2 / 0.1, apart - 0.025)
            else:
                each = apart if kind == "l1" else apart**2
            total, count = total + each.mean(), count + 1
    assert float(task.loss_sum(output, target, labelled_B)) == pytest.approx(total, rel=1e-6)
    assert float(task.count(target, labelled_B)) == count


@pytest.mark.parametrize("kind", ["js", "mse"])
def test_the_loss_of_heat_maps_wants_a_gaussian_at_each_point(kind: str) -> None:
    task = task_of(shape={"kind": kind, "weight": 0.7, "sigma": 1.3})
    target, labelled_B = batch()
    maps = heatmaps(2)
    places = centroids(maps.double().numpy())
    total = 0.0
    for b, k in np.ndindex(7, 4):
        if not (labelled_B[b] and target[b, k, 2] > 0):
            continue
        point = target[b, k, :2].double().numpy()
        p = np.exp(maps[b, k].double().numpy())
        p, q = p / p.sum(), wanted_shares(point, (9, 13), 1.3)
        m = (p + q) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            js = (np.nan_to_num(p * np.log(p / m)).sum() + np.nan_to_num(q * np.log(q / m)).sum()) / 2
        unlike = js if kind == "js" else ((p - q) ** 2).sum()
        total += np.abs(places[b, k] - point).mean() + 0.7 * unlike
    assert float(task.loss_sum(maps, target, labelled_B)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("head", ["heatmap", "regression"])
def test_a_missing_point_changes_neither_value_nor_gradient(head: str) -> None:
    task = task_of(head=head)
    target, _ = batch(5)
    labelled_B = torch.ones(7, dtype=torch.bool)
    output = heatmaps(4) if head == "heatmap" else heatmaps(4)[..., 0, :2].flatten(1)
    there = target[:, :-3, 2] > 0
    gradients = []
    for nonsense in (0.0, math.nan, math.inf):
        own = output.clone()
        points = own.view(7, 4, *(own.shape[2:] if head == "heatmap" else (2,)))
        points[~there] = nonsense
        own.requires_grad_()
        loss = task.loss_sum(own, target, labelled_B)
        loss.backward()
        assert own.grad is not None and bool(own.grad.isfinite().all())
        gradients.append((float(loss.detach()), own.grad))
    assert len({value for value, _ in gradients}) == 1
    assert all(torch.equal(gradients[0][1], each) for _, each in gradients)


def reference_length(reference: Any, places: np.ndarray, there: np.ndarray, size: np.ndarray) -> float:
    if reference == "diagonal":
        return float(np.hypot(*size))
    if reference == "extent":
        return float(max(np.ptp(places[there, 0]), np.ptp(places[there, 1]))) if there.any() else 0.0
    one, other = (NAMES.index(name) for name in reference)
    return float(np.linalg.norm(places[one] - places[other])) if there[one] and there[other] else 0.0


@pytest.mark.parametrize("reference", ["diagonal", "extent", ["left_eye", "right_eye"]])
@pytest.mark.parametrize("head", ["heatmap", "regression"])
def test_metrics_are_those_of_an_independent_implementation(reference: Any, head: str) -> None:
    task = task_of(head=head, reference=reference, alpha=0.3)
    parts, metrics = [], task.metrics()
    rows: list[dict[str, Any]] = []
    errors: list[list[tuple[float, float]]] = [[] for _ in NAMES]
    for seed in range(3):
        target, labelled_B = batch(seed)
        output = heatmaps(seed) if head == "heatmap" else heatmaps(seed)[..., 0, :2].flatten(1) / 4
        metrics.update(output, target, labelled_B)
        parts.append(int(labelled_B.sum()))
        values = output.double().numpy()
        said = centroids(values) if head == "heatmap" else values.reshape(7, 4, 2)
        for b in np.flatnonzero(labelled_B.numpy()):
            one = target[b].double().numpy()
            scale, size, there = np.array([one[-3, 0], one[-2, 1]]), one[-1, :2], one[:-3, 2] > 0
            places = one[:-3, :2] * scale
            length = reference_length(reference, places, there, size)
            for k in np.flatnonzero(there):
                errors[k].append((float(np.linalg.norm((said[b, k] - one[k, :2]) * scale)), length))
            answer = task.placed(task.decode(output[b : b + 1])[0], target[b].numpy())
            rows.append(task.judged(answer, output[b : b + 1], target[b : b + 1]))
            for k, name in enumerate(NAMES):
                point = answer["points"][name]
                expected = (said[b, k] + 1) * size / 2 - 0.5
                assert [point["x"], point["y"]] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-4)
    found = metrics.compute()
    every = [each for of_point in errors for each in of_point]
    expected = figures(every)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["num_samples"] == sum(parts)
    for k, values in enumerate(metrics.per_class()):
        assert {n: values[n] for n in expected} == pytest.approx(figures(errors[k]), rel=1e-6, nan_ok=True)
        assert values["support"] == len(errors[k])
    columns = {
        name: np.array([row[name] for row in rows]) for name in (*expected, "num_points", "num_referenced")
    }
    again = task.resampled(columns, np.ones((1, len(rows))))
    assert {name: float(again[name][0]) for name in expected} == pytest.approx(expected, rel=1e-6)


def figures(errors: list[tuple[float, float]]) -> dict[str, float]:
    shares = [error / length for error, length in errors if length]
    return {
        "nme": float(np.mean(shares)) if shares else math.nan,
        "pck": float(np.mean([share <= 0.3 for share in shares])) if shares else math.nan,
        "pixel_error": float(np.mean([error for error, _ in errors])) if errors else math.nan,
    }


@pytest.mark.parametrize("head", ["heatmap", "regression"])
def test_the_constant_answer_is_the_mean_place_of_each_point(head: str) -> None:
    task = task_of(head=head)
    baseline = task.baseline()
    assert baseline is not None
    places = task.read(baseline.output_C[None])[0].numpy()
    np.testing.assert_allclose(places, [[0.3, -0.2], [-0.31, 0.9], [0, 0], [0, 0]], atol=1e-6)


def test_a_heat_map_says_how_sure_it_is() -> None:
    task = task_of()
    maps = torch.full((1, 4, 9, 13), -30.0)
    maps[0, 0, 4, 6] = 30
    maps[0, 1, 0, 0] = maps[0, 1, 8, 12] = 30  # at two ends: the mean is between
    points = task.decode(maps)[0]["points"]
    assert points["left_eye"]["confidence"] == pytest.approx(1)
    assert points["right_eye"]["confidence"] < 0.01
    assert points["chin"]["confidence"] == pytest.approx(9 / (9 * 13))
    assert "confidence" not in task_of(head="regression").decode(torch.zeros(1, 8))[0]["points"]["chin"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reference": ["left_eye", "ear"]},
            "two of the points left_eye, right_eye, nose, chin, found 'ear'",
        ),
        (
            {"head": "regression", "shape": {"sigma": 2}},
            "tasks.face.shape: expected none with head: regression",
        ),
    ],
)
def test_settings_that_do_not_fit_the_points_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(**settings)


def test_a_run_says_which_names_it_takes_for_left_and_right() -> None:
    assert "exchanges left_eye and right_eye" in task_of().notes()[0]
    stated = TaskInfo("keypoints", NAMES, facts={"swap": []})
    assert KeypointsSettings().build("face", stated).notes() == []
