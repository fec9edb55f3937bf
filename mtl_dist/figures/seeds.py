"""Ways to train beside one another: every seed, their mean and standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_dist.figures.saving import save_png

MEAN_COLOUR, SEED_COLOUR = "#2f6db5", "#8a8f98"


def draw_seeds(names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Draw one panel per title with one line per name; NaN where a seed has no value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 2.6 * len(panels), 1.0 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for number, values in enumerate(lines):
            known = [value for value in values if math.isfinite(value)]
            axis.plot(known, [number] * len(known), "o", color=SEED_COLOUR, markersize=3, alpha=0.8)
            mean = statistics.fmean(known) if known else math.nan
            deviation = statistics.stdev(known) if len(known) > 1 else 0.0
            axis.errorbar(mean, number, xerr=deviation, fmt="D", color=MEAN_COLOUR, markersize=5, capsize=3)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()
    save_png(figure, path)
