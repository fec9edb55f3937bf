"""What a run says of itself: tasks with their labels and what they are to beat, whole epochs."""

from __future__ import annotations

import pytest

from mtl_dist.runs.announcements import described
from mtl_dist.specs import TaskInfo
from mtl_dist.training.plan import Plan


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (
            TaskInfo("classification", ("cat", "dog"), num_labelled=4, class_counts=(1, 3)),
            "classification of 2 classes, 4 labels in train, 2 in val, majority dog 75.0%",
        ),
        (
            TaskInfo("regression", num_labelled=1, mean=40.25, std=3.0, unit="years"),
            "regression, 1 label in train, 2 in val, mean 40.25 +- 3 years",
        ),
        (
            TaskInfo("segmentation", ("background", "a"), num_labelled=3, class_counts=(9, 1)),
            "segmentation of 2 classes, 3 labels in train, 2 in val",
        ),
        (TaskInfo("classification", ("a", "b")), "classification of 2 classes, 0 labels in train, 2 in val"),
    ],
)
def test_a_task_is_described_with_its_labels_and_its_baseline(info: TaskInfo, words: str) -> None:
    assert described(info, 2) == words


@pytest.mark.parametrize(
    ("end", "position", "words"),
    [(300, 112, "1/3"), (300, 300, "3/3"), (300, 208, "2/3"), (48, 48, "0.48/0.48"), (250, 250, "2.50/2.50")],
)
def test_epochs_are_whole_where_they_are(end: int, position: int, words: str) -> None:
    """A step of 16 that ends the first epoch of 100 samples reaches position 112."""
    plan = Plan(100, end, 16, 1, seed=0, evaluate_every=1, checkpoint_every=None, log_every=1)
    assert plan.epoch_words(position) == words
