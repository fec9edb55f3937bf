"""Conflicts over a run: the mean cosine of every pair, a picture of it and a plain sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mtl_dist.figures.conflicts import conflicts_in, draw_conflicts
from mtl_dist.figures.run_figures import RunFigures
from mtl_dist.tracking.registry import open_tracker

ROWS = [
    {"kind": "balance", "balance/cosine/a/b": -0.5, "balance/cosine/a/c": 0.2, "balance/gradient_norm/a": 3},
    {"kind": "step", "balance/cosine/a/b": -1.0},
    {"kind": "balance", "balance/cosine/a/b": 0.1, "balance/cosine/a/c": 0.4, "balance/cosine/b/c": None},
]


def test_the_mean_cosine_of_each_pair_is_over_the_looks_that_compared_it() -> None:
    found = conflicts_in(ROWS)
    assert found is not None
    assert found.tasks == ("a", "b", "c")
    expected = np.array([[1, -0.2, 0.3], [-0.2, 1, np.nan], [0.3, np.nan, 1]])
    np.testing.assert_allclose(found.cosines_TT, expected, rtol=1e-12)
    assert found.compared_TT.tolist() == [[0, 2, 2], [2, 0, 0], [2, 0, 0]]
    assert found.conflicts_TT[0, 1] == 1


def looks(*cosines: float) -> list[str]:
    found = conflicts_in([{"kind": "balance", "balance/cosine/a/b": cosine} for cosine in cosines])
    assert found is not None
    return found.sentences()


def test_two_tasks_that_conflict_are_named_in_a_sentence() -> None:
    assert looks(-0.5, -0.3, -0.4, -0.05, -0.5) == [
        "a and b conflict: the mean cosine of their gradients is -0.35 (standard error 0.08), "
        "below -0.1 in 4 of 5 comparisons."
    ]


def test_a_few_looks_or_noise_are_no_evidence() -> None:
    assert looks(-0.9, -0.9, -0.9, -0.9)[0].startswith(
        "Whether tasks conflict is not known after 4 comparisons"
    )
    assert looks(-0.9, 0.5, -0.8, 0.6, -0.7)[0].startswith(
        "No two tasks are seen to conflict in 5 comparisons"
    )


def test_peace_is_said_too_and_nothing_where_nothing_was_compared() -> None:
    assert looks(*[0.5] * 6) == [
        "No two tasks are seen to conflict in 6 comparisons: the lowest mean cosine of gradients is 0.50, "
        "of a and b."
    ]
    assert conflicts_in([{"kind": "balance", "balance/gradient_norm/a": 1.0}, {"kind": "step"}]) is None
    unknown = conflicts_in([{"kind": "balance", "balance/cosine/a/b": None}])
    assert unknown is None


@pytest.mark.parametrize("num_panels", [1, 5])
def test_the_heat_map_is_a_picture_of_every_panel(tmp_path: Path, num_panels: int) -> None:
    found = conflicts_in(ROWS)
    assert found is not None
    draw_conflicts({f"run {n}": found for n in range(num_panels)}, tmp_path / "conflicts.png")
    assert (tmp_path / "conflicts.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_compared_gradients_ends_with_the_sentence_and_the_picture(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    for step in range(5):
        tracker.record("balance", step, 0.5, {"balance/cosine/digit/age": -0.3})
        if step == 3:  # that nothing is known yet is no news at the end of a small run
            said: list[str] = []
            RunFigures(tmp_path, say=said.append).draw_conflicts()
            assert said == []
    RunFigures(tmp_path, say=tracker.say).draw_conflicts()
    tracker.close()
    assert "digit and age conflict: the mean cosine" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "evaluation" / "conflicts.png").is_file()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"balance"}
