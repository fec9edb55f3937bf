"""The name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(found: str, choices: Iterable[str]) -> str | None:
    """The choice that `found` was probably meant to be, if any comes near.

    >>> nearest("Weigth", ["weight", "loss"])
    'weight'
    """
    by_folded = {name.lower().replace("-", "_"): name for name in choices}
    matches = difflib.get_close_matches(found.lower().replace("-", "_"), by_folded, n=1)
    return by_folded[matches[0]] if matches else None
