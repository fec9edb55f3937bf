"""Pictures on disk: whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl_dist.durable import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_png(figure: Figure, path: Path) -> None:
    """Replace the picture at `path` in one step."""
    with replacing(path, sync=False) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
