"""docs/metrics.md has every metric of every kind, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtl_dist.tasks.registry import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
SECTIONS = {
    title.strip(): re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    for title, _, text in (section.partition("\n") for section in PAGE.split("\n## ")[1:])
}


@pytest.mark.parametrize("kind", TASKS)
def test_every_metric_of_a_kind_stands_there_in_order(kind: str) -> None:
    assert SECTIONS[kind] == list(TASKS[kind].modes)


def test_no_other_kind_stands_there() -> None:
    assert set(SECTIONS) == {"of a split", "every kind", "of each class", *TASKS}
    assert SECTIONS["every kind"] == ["loss", "num_samples"]


def test_the_figures_of_a_split_are_what_an_evaluation_and_the_monitor_have() -> None:
    from mtl_dist.monitor import WEIGHTED_MEAN
    from mtl_dist.tasks.metrics import MEAN_ACCURACY

    assert SECTIONS["of a split"] == ["loss", MEAN_ACCURACY, WEIGHTED_MEAN.removeprefix("val/")]
