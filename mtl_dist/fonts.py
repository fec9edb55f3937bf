"""Fonts for text of any script: matplotlib's DejaVu Sans, or what is installed here for what it lacks."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from mtl_dist.printable import say


def font_for(text: str) -> Path:
    """The font file in which to draw the text: the first with all of its characters, else the standard."""
    return next((path for path in (standard(), *others_for(text)) if not lacking([path], text)), standard())


def others_for(text: str) -> list[Path]:
    """The installed fonts with characters of the text that the standard one lacks, as few as are needed.

    What none of them has is said once, on standard error; boxes are drawn in its place.
    """
    return list(_others(frozenset(lacking([standard()], text))))


def family_of(path: Path) -> str:
    """The name by which matplotlib knows a font file."""
    from matplotlib.font_manager import fontManager

    return next(entry.name for entry in fontManager.ttflist if Path(entry.fname) == path)


def lacking(paths: Iterable[Path], text: str) -> set[str]:
    """The characters of the text that none of these fonts has."""
    known = [characters_of(path) for path in paths]
    drawn = {each for each in text if each.isprintable() and not each.isspace()}
    return {each for each in drawn if not any(ord(each) in characters for characters in known)}


@cache
def standard() -> Path:
    """matplotlib's own font, which is there wherever it is."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def characters_of(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(path)).get_charmap())


@cache
def _others(missing: frozenset[str]) -> tuple[Path, ...]:
    if not missing:
        return ()
    from matplotlib.font_manager import fontManager

    found: list[Path] = []
    left = set(missing)
    fonts = [e for e in fontManager.ttflist if e.style == "normal" and not e.name.startswith("Last Resort")]
    for entry in sorted(fonts, key=lambda e: (e.weight not in (400, "normal", "regular"), e.fname)):
        has = left - lacking([Path(entry.fname)], "".join(left))
        if has:
            found.append(Path(entry.fname))
            left -= has
        if not left:
            return tuple(found)
    shown = "".join(sorted(left)[:12])
    say(
        f"pictures: expected a font with {shown}, found none installed: boxes stand in their place.",
        sys.stderr,
    )
    return tuple(found)
