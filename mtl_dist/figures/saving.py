"""Pictures on disk: whole or absent."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_dist.durable import replacing
from mtl_dist.fonts import family_of, others_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_png(figure: Figure, path: Path) -> None:
    """Replace the picture at `path` in one step; text of any script is drawn in a font that has it."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if others := others_for(text.get_text()):
            text.set_fontfamily([*text.get_fontfamily(), *map(family_of, others)])
    with replacing(path, sync=False) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # said already
        figure.savefig(temporary, format="png", dpi=110)
