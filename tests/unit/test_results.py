"""What `mtl evaluate --per-class` prints."""

from __future__ import annotations

import pytest

from mtl_dist.evaluator import Evaluation
from mtl_dist.results import print_per_class

OF_CLASSES = {"precision": 0.5, "recall": 0.25, "f1": 0.3333, "support": 12.0}
OF_POINTS = {"nme": 0.125, "pck": 0.75, "pixel_error": 1.5, "support": 3.0}
OF_NUMBERS = {"nrmse": 0.5, "mae": 1.0, "rmse": 2.0, "r2": -0.5, "support": 4.0}


def test_tasks_of_other_sorts_have_tables_of_their_own_which_nothing_is_cut_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = {
        "breed": {"cat": OF_CLASSES},
        "face": {"left": OF_POINTS},
        "pose": {"x": OF_NUMBERS},
        "mood": {"calm": OF_CLASSES},
    }
    print_per_class(Evaluation(0.0, {}, {}, 9, per_class=tasks))
    printed = capsys.readouterr().out
    assert "…" not in printed
    lines = [line.split() for line in printed.splitlines()]
    header = ["task", "class", "or", "part"]
    assert [line for line in lines if line[:1] == ["task"]] == [
        [*header, *OF_CLASSES],
        [*header, *OF_POINTS],
        [*header, *OF_NUMBERS],
    ]
    assert ["mood", "calm", "0.5000", "0.2500", "0.3333", "12"] in lines
    assert ["pose", "x", "0.5000", "1.0000", "2.0000", "-0.5000", "4"] in lines


def test_a_run_without_parts_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_per_class(Evaluation(0.0, {}, {}, 9))
    assert capsys.readouterr().out == "No task of the run has classes or other parts.\n"
