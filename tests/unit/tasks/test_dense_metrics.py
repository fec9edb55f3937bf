"""The metrics of depth and normals are those of numpy, and pixels without a label are nowhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.depth import DepthSettings
from mtl_dist.tasks.normals import NormalsSettings

DEPTH = TaskInfo(
    "depth",
    num_labelled=9,
    mean=3.0,
    std=1.5,
    minimum=0.5,
    maximum=9.0,
    unit="m",
    facts={"pixels": 900, "positive": 900, "log_mean": 1.0, "log_std": 0.5},
)
NORMALS = TaskInfo("normals", num_labelled=9, facts={"pixels": 9, "mean": [0.0, 0.1, 0.8]})


def depth_batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of some pixels, one whole map and one sample the label is missing."""
    key = torch.Generator().manual_seed(seed)
    batches = []
    for num in (4, 3):
        target = 0.5 + 6 * torch.rand(num, 7, 9, generator=key)
        target[torch.rand(num, 7, 9, generator=key) < 0.3] = math.nan
        target[1] = math.nan
        labelled = torch.tensor([True, True, False, True][:num])
        batches.append((torch.randn(num, 1, 7, 9, generator=key), target, labelled))
    return batches


def normals_batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    key = torch.Generator().manual_seed(seed)
    batches = []
    for num in (4, 3):
        target = torch.nn.functional.normalize(torch.randn(num, 3, 7, 9, generator=key), dim=1)
        output = 3 * target + 2 * torch.randn(num, 3, 7, 9, generator=key)
        absent = torch.rand(num, 1, 7, 9, generator=key) < 0.3
        target = torch.where(absent, math.nan, target)
        labelled = torch.tensor([True, True, False, True][:num])
        batches.append((output, target, labelled))
    return batches


@pytest.mark.parametrize("space", ["linear", "log"])
def test_depth_metrics_are_those_of_numpy(space: str) -> None:
    task = DepthSettings(space=space).build("depth", DEPTH)  # type: ignore[arg-type]
    metrics = task.metrics()
    for batch in depth_batches(0):
        metrics.update(*batch)
    predicted, true, images = [], [], []
    for output, target, labelled in depth_batches(0):
        for out, values in zip(output[labelled].numpy(), target[labelled].numpy(), strict=True):
            read = out[0].astype(np.float64) * (0.5 if space == "log" else 1.5)
            read = np.exp(read + 1.0) if space == "log" else read + 3.0
            there = ~np.isnan(values)
            predicted.append(read[there])
            true.append(values[there].astype(np.float64))
            if there.any():
                logs = np.log(np.maximum(predicted[-1], 0.5)) - np.log(true[-1])
                images.append(100 * np.std(logs))
    p, t = np.concatenate(predicted), np.concatenate(true)
    q = np.maximum(p, 0.5)
    ratio = np.maximum(q / t, t / q)
    expected = {
        "mae": np.abs(p - t).mean(),
        "rmse": np.sqrt(((p - t) ** 2).mean()),
        "r2": 1 - ((p - t) ** 2).sum() / ((t - t.mean()) ** 2).sum(),
        "abs_rel": (np.abs(q - t) / t).mean(),
        "sq_rel": ((q - t) ** 2 / t).mean(),
        "rmse_log": np.sqrt(((np.log(q) - np.log(t)) ** 2).mean()),
        "log10": np.abs(np.log10(q) - np.log10(t)).mean(),
        "silog": np.mean(images),
        "delta1": (ratio < 1.25).mean(),
        "delta2": (ratio < 1.25**2).mean(),
        "delta3": (ratio < 1.25**3).mean(),
        "num_samples": 5.0,
    }
    assert metrics.compute() == pytest.approx(expected, rel=1e-6)
    assert list(metrics.compute())[:-1] == list(DepthSettings.modes)


def test_normals_metrics_are_those_of_numpy_and_the_median_is_exact_to_its_bin() -> None:
    metrics = NormalsSettings().build("normals", NORMALS).metrics()
    angles = []
    for output, target, labelled in normals_batches(0):
        metrics.update(output, target, labelled)
        vectors = np.moveaxis(output[labelled].double().numpy(), 1, -1).reshape(-1, 3)
        true = np.moveaxis(target[labelled].double().numpy(), 1, -1).reshape(-1, 3)
        there = ~np.isnan(true[:, 0])
        vectors, true = vectors[there], true[there]
        cosines = (vectors * true).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(true, axis=1)
        angles.append(np.degrees(np.arccos(np.clip(cosines, -1, 1))))
    all_angles = np.concatenate(angles)
    found = metrics.compute()
    assert found["median_angle"] == pytest.approx(
        np.median(all_angles),
        abs=0.02 + np.diff(np.sort(all_angles)[len(all_angles) // 2 - 1 : len(all_angles) // 2 + 1]).item(),
    )
    del found["median_angle"]
    assert found == pytest.approx(
        {
            "mean_angle": all_angles.mean(),
            "within_11_25": (all_angles < 11.25).mean(),
            "within_22_5": (all_angles < 22.5).mean(),
            "within_30": (all_angles < 30).mean(),
            "num_samples": 5.0,
        },
        rel=1e-6,
    )


def test_a_small_angle_keeps_its_digits() -> None:
    angle = math.radians(0.003)
    target = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    output = torch.tensor([math.sin(angle), 0.0, math.cos(angle)]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    metrics = NormalsSettings().build("normals", NORMALS).metrics()
    metrics.update(output, target, torch.tensor([True]))
    assert metrics.compute()["mean_angle"] == pytest.approx(0.003, rel=1e-4)


@pytest.mark.parametrize("kind", ["depth", "normals"])
def test_a_split_without_a_label_has_no_metric(kind: str) -> None:
    task = DepthSettings().build("x", DEPTH) if kind == "depth" else NormalsSettings().build("x", NORMALS)
    values = task.metrics().compute()
    assert values.pop("num_samples") == 0
    assert all(math.isnan(value) for value in values.values())


LOSSES = [
    ("depth", "linear", {"kind": "l1"}),
    ("depth", "linear", {"kind": "mse", "gradient": 0.5}),
    ("depth", "log", {"kind": "huber", "delta": 0.3}),
    ("depth", "linear", {"kind": "berhu", "gradient": 1.0}),
    ("depth", "log", {"kind": "silog"}),
    ("normals", "", {"kind": "cosine"}),
    ("normals", "", {"kind": "l1"}),
    ("normals", "", {"kind": "angular"}),
]


@pytest.mark.parametrize(("kind", "space", "loss"), LOSSES)
def test_pixels_and_samples_without_a_label_leave_no_trace_in_loss_and_gradient(
    kind: str, space: str, loss: dict[str, object]
) -> None:
    if kind == "depth":
        task = DepthSettings.model_validate({"space": space, "loss": loss}).build("x", DEPTH)
        output, target, labelled = depth_batches(1)[0]
    else:
        task = NormalsSettings.model_validate({"loss": loss}).build("x", NORMALS)
        output, target, labelled = normals_batches(1)[0]
    other = output.clone()
    absent = torch.isnan(target).view(output.shape) | ~labelled[:, None, None, None]
    other[absent] = math.inf
    values = []
    for given in (output, other):
        given = given.clone().requires_grad_()
        total = task.loss_sum(given, target, labelled)
        total.backward()
        assert given.grad is not None and torch.isfinite(given.grad).all()
        assert (given.grad[absent] == 0).all()
        values.append(total.item())
    assert values[0] == pytest.approx(values[1])
    assert values[0] > 0 and task.count(target, labelled) > 0


@pytest.mark.parametrize(("kind", "space", "loss"), LOSSES)
def test_a_perfect_answer_has_no_loss_and_all_metrics_at_their_best(
    kind: str, space: str, loss: dict[str, object]
) -> None:
    if kind == "depth":
        task = DepthSettings.model_validate({"space": space, "loss": loss}).build("x", DEPTH)
        _, target, labelled = depth_batches(1)[0]
        output = ((target.log() - 1.0) / 0.5 if space == "log" else (target - 3.0) / 1.5)[:, None]
    else:
        task = NormalsSettings.model_validate({"loss": loss}).build("x", NORMALS)
        _, target, labelled = normals_batches(1)[0]
        output = target * 5
    output = torch.nan_to_num(output, nan=7.0)
    assert task.loss_sum(output, target, labelled) == pytest.approx(0, abs=1e-3)
    metrics = task.metrics()
    metrics.update(output, target, labelled)
    for name, value in metrics.compute().items():
        if name in task.settings.modes:
            best = 1.0 if task.settings.modes[name] == "max" else 0.0
            assert value == pytest.approx(best, abs=0.02), name


def test_silog_forgives_a_factor_as_far_as_it_is_told() -> None:
    _, target, labelled = depth_batches(1)[0]
    output = torch.nan_to_num(((target * 2).log() - 1.0) / 0.5)[:, None]
    found = []
    for focus in (0.0, 1.0):
        settings = DepthSettings.model_validate({"space": "log", "loss": {"kind": "silog", "focus": focus}})
        task = settings.build("x", DEPTH)
        found.append(float(task.loss_sum(output, target, labelled) / task.count(target, labelled)))
    assert found == pytest.approx([math.log(2) ** 2, 0.0], abs=1e-5)


def test_a_loss_of_logarithms_wants_logarithms() -> None:
    settings = DepthSettings.model_validate({"loss": {"kind": "silog"}})
    with pytest.raises(Exception, match=r"tasks.x.space: expected log for the loss silog, found linear"):
        settings.build("x", DEPTH)


def test_answers_are_in_the_unit() -> None:
    task = DepthSettings(space="log").build("x", DEPTH)
    output = torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    answer = task.decode(output)[0]
    values = task.map_of(answer)
    assert values == pytest.approx((output[0, 0] * 0.5 + 1.0).exp().numpy(), rel=1e-5)
    assert answer["minimum"] < answer["mean"] < answer["maximum"] and answer["unit"] == "m"
    normals = NormalsSettings().build("n", NORMALS)
    answer = normals.decode(torch.randn(1, 3, 5, 6, generator=torch.Generator().manual_seed(0)))[0]
    vectors = normals.map_of(answer)
    assert vectors is not None and vectors.shape == (3, 5, 6)
    assert np.linalg.norm(vectors, axis=0) == pytest.approx(np.ones((5, 6)), abs=1e-6)
