"""A confusion matrix as a picture."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from mtl_dist.figures.confusion import draw_confusion


def test_long_names_of_classes_leave_the_matrix_its_place(tmp_path: Path) -> None:
    """matplotlib warns where it finds none, and cuts the names at the picture's edge."""
    names = ["short", "x" * 300, "a class of many words, one of which is the last"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(np.eye(3), names, "task (test)", tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
