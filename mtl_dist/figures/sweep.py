"""A sweep: one panel per swept key, every run a dot over its value, the mean of each value, the best run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_dist.figures.saving import save_png
from mtl_dist.figures.seeds import MEAN_COLOUR, SEED_COLOUR

BEST_COLOUR = "#c8452d"


def draw_sweep(runs: Sequence[tuple[Mapping[str, str], float]], metric: str, path: Path) -> None:
    """Draw the runs, best first: each its values by key, and its `metric` (NaN: it has none)."""
    from matplotlib.figure import Figure

    known = [(values, result) for values, result in runs if math.isfinite(result)]
    keys = list(runs[0][0])
    figure = Figure(figsize=(1.0 + 3.2 * len(keys), 3.2), layout="constrained")
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys, strict=True):
        choices = in_order(list(dict.fromkeys(values[key] for values, _ in runs)))
        places = {choice: number for number, choice in enumerate(choices)}
        results: dict[str, list[float]] = {choice: [] for choice in choices}
        for values, result in known:
            results[values[key]].append(result)
        axis.plot(
            [places[values[key]] for values, _ in known],
            [result for _, result in known],
            "o",
            color=SEED_COLOUR,
            markersize=4,
            alpha=0.8,
        )
        means = [(places[choice], statistics.fmean(own)) for choice, own in results.items() if own]
        axis.plot([x for x, _ in means], [y for _, y in means], "-", color=MEAN_COLOUR, label="mean")
        if known:
            best, result = known[0]
            axis.plot([places[best[key]]], [result], "D", color=BEST_COLOUR, markersize=6, label="best")
        turned = max(len(choice) for choice in choices) > 8
        axis.set_xticks(range(len(choices)), choices, fontsize=8, rotation=30 if turned else 0)
        axis.set_title(key, loc="left", fontsize=9)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel(metric, fontsize=9)
    if known:
        axes[-1].legend(frameon=False, fontsize=8)
    save_png(figure, path)


def in_order(choices: Sequence[str]) -> list[str]:
    """Numbers by size, else as they were given.

    >>> in_order(["1e-2", "0.1", "1e-3"]), in_order(["sgd", "adamw"])
    (['1e-3', '1e-2', '0.1'], ['sgd', 'adamw'])
    """
    try:
        return sorted(choices, key=float)
    except ValueError:
        return list(choices)
