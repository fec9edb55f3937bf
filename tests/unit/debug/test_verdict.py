"""What debug mode advises, by what it has seen."""

from __future__ import annotations

import pytest

from mtl_dist.debug.verdict import about_constant
from mtl_dist.specs import TaskInfo


@pytest.mark.parametrize(
    ("info", "advice"),
    [
        (TaskInfo("regression", (), 9, mean=7.5, minimum=7.5, maximum=7.5), "take the task out"),
        (
            TaskInfo("regression", (), 9, mean=7.5, std=2.0, minimum=1.0, maximum=9.0),
            "Try another train.seed",
        ),
        (TaskInfo("classification", ("a", "b"), 9, (5, 4)), "Try another train.seed"),
    ],
)
def test_other_samples_are_advised_only_where_they_have_other_labels(info: TaskInfo, advice: str) -> None:
    assert about_constant(info, "7.5").endswith(advice)
