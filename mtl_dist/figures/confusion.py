"""Confusion matrices as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtl_dist.figures.saving import save_png
from mtl_dist.figures.svg import cut

_LONGEST = 30


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """Draw a confusion matrix (C, C), rows true; colours are shares of the true class, numbers are counts."""
    from matplotlib.figure import Figure

    longest = min(_LONGEST, max(map(len, classes)))
    side = min(14.0, 2.5 + 0.42 * len(classes) + 0.05 * longest)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    names = [cut(name, _LONGEST) for name in classes]  # longer ones would leave no place for the matrix
    axis.set_xticks(ticks, names, rotation=90, fontsize=8)
    axis.set_yticks(ticks, names, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(title, loc="left", fontsize=10)
    if len(classes) <= 30:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = str(int(matrix[row, column]))
            axis.text(column, row, count, ha="center", va="center", color=colour, fontsize=7)
    save_png(figure, path)
