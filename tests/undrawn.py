"""Runs of tests that do not look at their pictures: drawing is four fifths of a small run's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mtl_dist.figures import conflicts, curves, run_figures


@contextmanager
def undrawn() -> Iterator[None]:
    """Runs of this process go through all of theirs but the drawing of curves and conflicts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_learning_curves", "draw_conflicts"):
            patch.setattr(run_figures, name, lambda *arguments: None)
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Within `undrawn`: they draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_figures, "draw_learning_curves", curves.draw_learning_curves)
        patch.setattr(run_figures, "draw_conflicts", conflicts.draw_conflicts)
        yield
