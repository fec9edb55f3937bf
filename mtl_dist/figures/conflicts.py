"""Which tasks conflict over a whole run: the mean cosine of their gradients, as a heat map and a sentence.

The rows are those of metrics.jsonl whose kind is "balance": one for every step in which the tasks' gradients
were compared (`balance.diagnose_every`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mtl_dist.balance.evidence import CONFLICT, LOOKS, conflict_sentence, is_conflict
from mtl_dist.figures.saving import save_png
from mtl_dist.plural import plural

PREFIX = "balance/cosine/"


@dataclass(frozen=True)
class Conflicts:
    """What was found over one run, or several runs of the same tasks.

    cosines_TT  the mean cosine of each pair, symmetric, 1 on the diagonal; NaN for a pair never compared
    compared_TT    in how many steps each pair was compared, and `conflicts_TT` in how many of them it fought
    cosines     the cosines of each pair that was compared, in order
    """

    tasks: tuple[str, ...]
    cosines_TT: np.ndarray
    compared_TT: np.ndarray
    conflicts_TT: np.ndarray
    cosines: Mapping[tuple[str, str], Sequence[float]]

    @property
    def looks(self) -> int:
        """How often gradients were compared, of the pair for which that was most often."""
        return max(map(len, self.cosines.values()), default=0)

    @property
    def is_enough(self) -> bool:
        """Whether so many comparisons can show a conflict."""
        return self.looks >= LOOKS

    def sentences(self) -> list[str]:
        """A plain sentence for each pair that conflicts, the worst first; one if none is seen to."""
        pairs = sorted(self.cosines, key=lambda pair: fmean(self.cosines[pair]))
        if not pairs:
            return []
        conflicting = [
            f"{conflict_sentence(*pair, self.cosines[pair])}."
            for pair in pairs
            if is_conflict(self.cosines[pair])
        ]
        if conflicting:
            return conflicting
        (first, second), looks = pairs[0], self.looks
        cosine = fmean(self.cosines[first, second])
        lowest = f"the lowest mean cosine of gradients is {cosine:z.2f}, of {first} and {second}"
        if not self.is_enough:
            return [
                f"Whether tasks conflict is not known after {plural(looks, 'comparison')} of their "
                f"gradients, {LOOKS} or more show it: {lowest}."
            ]
        return [f"No two tasks are seen to conflict in {plural(looks, 'comparison')}: {lowest}."]


def conflicts_in(rows: Iterable[Mapping[str, Any]]) -> Conflicts | None:
    """What the rows of one run's metrics.jsonl say, or of several; None where no gradients were compared."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get("kind") != "balance":
            continue
        for name, value in row.items():
            if name.startswith(PREFIX) and value is not None:
                first, _, second = name.removeprefix(PREFIX).partition("/")
                found.setdefault((first, second), []).append(value)
    if not found:
        return None
    tasks = _in_order(found)
    cosines_TT = np.full((len(tasks), len(tasks)), np.nan)
    np.fill_diagonal(cosines_TT, 1.0)
    compared_TT = np.zeros((len(tasks), len(tasks)), np.int64)
    conflicts_TT = np.zeros_like(compared_TT)
    for (first, second), values in found.items():
        for at in ((tasks.index(first), tasks.index(second)), (tasks.index(second), tasks.index(first))):
            cosines_TT[at] = np.mean(values)
            compared_TT[at] = len(values)
            conflicts_TT[at] = sum(value < CONFLICT for value in values)
    return Conflicts(tasks, cosines_TT, compared_TT, conflicts_TT, found)


def _in_order(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The tasks of (earlier, later) pairs in the recipe's order, as far as the pairs decide it."""
    before: dict[str, set[str]] = {}
    for first, second in pairs:
        before.setdefault(first, set())
        before.setdefault(second, set()).add(first)
    return tuple(sorted(before, key=lambda task: len(before[task])))


def draw_conflicts(panels: Mapping[str, Conflicts], path: Path) -> None:
    """Draw one heat map (task x task, mean cosine) per title, red where two tasks conflict."""
    from matplotlib.figure import Figure

    largest = max(len(conflicts.tasks) for conflicts in panels.values())
    side = min(9.0, 1.8 + 0.5 * largest)
    columns = min(4, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(0.8 + side * columns, side * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, conflicts) in zip(axes, panels.items(), strict=False):
        # Greys for no conflict would hide how strongly others agree: red is below 0, blue above.
        image = axis.imshow(conflicts.cosines_TT, cmap="RdBu", vmin=-1, vmax=1)
        ticks = range(len(conflicts.tasks))
        axis.set_xticks(ticks, conflicts.tasks, rotation=90, fontsize=8)
        axis.set_yticks(ticks, conflicts.tasks, fontsize=8)
        axis.set_title(title, loc="left", fontsize=9)
        if len(conflicts.tasks) <= 12:
            for row, column in zip(*np.nonzero(conflicts.compared_TT), strict=True):
                cosine = conflicts.cosines_TT[row, column]
                colour = "white" if abs(cosine) > 0.6 else "black"
                axis.text(column, row, f"{cosine:z.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="mean cosine of gradients")
    save_png(figure, path)
