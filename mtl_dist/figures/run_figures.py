"""The pictures of one run, drawn from its record: learning_curves.png, evaluation/conflicts.png."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mtl_dist.figures.conflicts import conflicts_in, draw_conflicts
from mtl_dist.figures.curves import draw_learning_curves
from mtl_dist.tracking.files import history_of, read_rows

CURVES, CONFLICTS = "learning_curves.png", "evaluation/conflicts.png"
SECONDS_BETWEEN_PICTURES = 60.0
"""Drawing takes a second, in which the ranks wait for rank 0."""


class RunFigures:
    """Draws on rank 0; on the other ranks (`directory` None) every call does nothing.

    `monitored` is the metric that chooses the best weights: the curves show it in any case. A picture is not
    worth a run: one that cannot be drawn is reported to `say`, once.
    """

    def __init__(
        self, directory: Path | None, monitored: str = "", say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._directory = directory
        self._monitored = monitored
        self._say = say
        self._drawn = time.monotonic()
        self._failed: set[str] = set()

    def refresh(self) -> None:
        """Draw the curves again if the last ones are old."""
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_PICTURES:
            self.draw_curves()

    def draw_curves(self) -> None:
        """Write learning_curves.png, if an epoch has ended."""
        self._draw(CURVES, self._curves)
        self._drawn = time.monotonic()

    def draw_conflicts(self) -> None:
        """Write evaluation/conflicts.png and say which tasks fought over the run, if that was looked at
        often enough: that nothing is known yet is said where it is asked, on the page of the run."""
        self._draw(CONFLICTS, self._conflicts)

    def _curves(self, path: Path) -> None:
        history = history_of(read_rows(path.parent))
        if history["step"]:
            draw_learning_curves(history, path, self._monitored)

    def _conflicts(self, path: Path) -> None:
        found = conflicts_in(read_rows(path.parent.parent))
        if found is None:
            return
        for sentence in found.sentences() if found.is_enough else ():
            self._say(sentence)
        path.parent.mkdir(exist_ok=True)
        draw_conflicts({"mean cosine of gradients over the run": found}, path)

    def _draw(self, name: str, draw: Callable[[Path], None]) -> None:
        if self._directory is None:
            return
        try:
            draw(self._directory / name)
        except Exception as error:  # whatever the disk, the record or matplotlib raises
            if name not in self._failed:
                self._say(
                    f"warning  {name} cannot be drawn, training goes on: {type(error).__name__}: {error}"
                )
            self._failed.add(name)
