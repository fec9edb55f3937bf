"""The metrics of the training steps are those of scikit-learn over the steps' own outputs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from mtl_dist.tracking.files import history_of, read_rows
from mtl_dist.training.running_metrics import RunningMetrics, Seen
from tests.ranks import RankPool, shared_pool
from tests.tiny_runs import rows, tensors_at, train_run

pytestmark = pytest.mark.slow

Parts = dict[str, list[tuple[torch.Tensor, ...]]]


def train_and_see(recipe: Path, run: Path, overrides: Sequence[str]) -> list[Parts]:
    """Train on this rank; by epoch and task what the steps' outputs were."""
    epochs: list[Parts] = [{}]
    take, begin_epoch = RunningMetrics.take, RunningMetrics.begin_epoch

    def noting(self: RunningMetrics, window: Sequence[Seen]) -> None:
        take(self, window)
        for seen in window:
            for name, parts in seen.items():
                epochs[-1].setdefault(name, []).append(tuple(part.clone() for part in parts))

    def beginning(self: RunningMetrics) -> None:
        begin_epoch(self)
        epochs.append({})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningMetrics, "take", noting)
        patch.setattr(RunningMetrics, "begin_epoch", beginning)
        assert train_run(recipe, run, overrides) == "done"
    return epochs


def of_ranks(ranks: Sequence[Parts], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Outputs in float64 and targets of the labelled samples of all ranks."""
    parts = [part for rank in ranks for part in rank[task]]
    outputs, targets, counted = (torch.cat(each) for each in zip(*parts, strict=True))
    return outputs[counted].double().numpy(), targets[counted].numpy()


def expected(ranks: Sequence[Parts], mean: float, std: float) -> dict[str, float]:
    classes, truth = of_ranks(ranks, "digit")
    labels, tags = of_ranks(ranks, "tags")
    values, value = of_ranks(ranks, "value")
    maps, masks = of_ranks(ranks, "shape")
    scores = torch.from_numpy(classes).softmax(dim=1).numpy()
    pixels = masks.reshape(-1)
    predicted = (maps[:, 0] > 0).reshape(-1)[pixels != 255]
    unlike = values[:, 0] * std + mean - value
    present = np.unique(truth)
    return {
        "train/digit/accuracy": reference.accuracy_score(truth, classes.argmax(axis=1)),
        "train/digit/macro_f1": reference.f1_score(truth, classes.argmax(axis=1), average="macro"),
        "train/digit/auroc": np.mean([reference.roc_auc_score(truth == c, scores[:, c]) for c in present]),
        "train/digit/num_samples": len(truth),
        "train/tags/micro_f1": reference.f1_score(tags, labels > 0, average="micro"),
        "train/tags/mean_average_precision": np.mean(
            [reference.average_precision_score(*column) for column in zip(tags.T, labels.T, strict=True)]
        ),
        "train/value/mae": np.abs(unlike).mean(),
        "train/value/rmse": math.sqrt(np.square(unlike).mean()),
        "train/shape/pixel_accuracy": (predicted == pixels[pixels != 255]).mean(),
        "train/shape/dice": reference.f1_score(pixels[pixels != 255], predicted),
    }


def test_they_are_exact_over_ranks_accumulation_and_missing_labels(
    recipe: Path, ranks: RankPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = ["train.accumulation=2", "train.epochs=2", "monitor.metric=train/digit/accuracy"]
    seen = ranks.run(train_and_see, recipe, run, overrides)
    facts = _facts(run)["value"]
    found = rows(run, "epoch")
    assert len(found) == 2
    for epoch, row in enumerate(found):
        of_epoch = expected([rank[epoch] for rank in seen], facts["mean"], facts["std"])
        assert {name: row[name] for name in of_epoch} == pytest.approx(of_epoch, rel=1e-6)
        assert row["train/digit/num_samples"] < 30, "no label is missing"
        assert row.keys() >= {name.replace("val/", "train/") for name in row if name.startswith("val/")}
    accuracies = [row["train/digit/accuracy"] for row in found]
    assert max(accuracies) == _best(run)["value"] and _best(run)["metric"] == "train/digit/accuracy"
    history = history_of(read_rows(run))
    assert history["train"]["digit/accuracy"] == accuracies


def _facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "data.json").read_text())["task_infos"]  # type: ignore[no-any-return]


def _best(run: Path) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / "best.json").read_text())  # type: ignore[no-any-return]


def test_a_run_that_stopped_within_an_epoch_goes_on_to_the_same_ones_on_other_ranks(
    recipe: Path, ranks: RankPool, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    overrides = ["train.checkpoint_every=2", "train.epochs=2"]
    train_run(recipe, whole, overrides, dropout=False)
    shutil.copytree(whole, resumed)
    for path in (resumed / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > 6:
            shutil.rmtree(path)
    assert (resumed / "checkpoints" / "step_00000006" / "metrics.safetensors").is_file()
    ranks.run(train_run, recipe, resumed, overrides, False)
    for first, second in zip(rows(whole, "epoch"), rows(resumed, "epoch"), strict=True):
        assert second == pytest.approx(first, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_that_goes_on_on_as_many_ranks_has_the_same_sums_to_the_bit(
    recipe: Path, tmp_path: Path, num_ranks: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    overrides = ["train.checkpoint_every=1", "train.epochs=3"]
    pool = shared_pool(num_ranks)
    pool.run(train_run, recipe, whole, overrides)
    shutil.copytree(whole, resumed)
    for path in (resumed / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > 5:
            shutil.rmtree(path)
    pool.run(train_run, recipe, resumed, overrides)
    for step in (6, 7, 8):
        found, expected = tensors_at(resumed, step), tensors_at(whole, step)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (step, name)
    assert rows(resumed, "epoch") == rows(whole, "epoch")


def test_blended_images_count_in_none(recipe: Path, tmp_path: Path) -> None:
    blend = "data.blend={cutmix: 1.0, probability: 0.5}"
    train_run(recipe, tmp_path / "run", ["train.epochs=1", "tasks.value=null", blend])
    (row,) = rows(tmp_path / "run", "epoch")
    assert 0 < row["train/shape/num_samples"] < 30
    assert "blended images (data.blend) count in no training metric" in (tmp_path / "run/log.txt").read_text()


def test_they_are_left_out_on_request(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", ["train.epochs=1", "train.metrics=false"])
    (row,) = rows(tmp_path / "run", "epoch")
    assert {name for name in row if name.startswith("train/")} == {
        "train/loss",
        *(f"train/{task}/loss" for task in ("digit", "value", "tags", "shape")),
    }
