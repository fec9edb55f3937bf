"""The account of a preparation: what was found, and what became of each.

    files    1,402 = 1,400 images + 1 table + 1 left out: hidden
    images   1,400 = 1,399 samples + 1 left out: unreadable

An importer says what it found and what each thing became; a thing without a fate is a mistake of the
importer, and the preparation ends with its name. Nothing is lost silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias

from mtl_dist.errors import UserError

Totals: TypeAlias = dict[str, dict[str, int]]
"""By unit ("files", "rows", "pages"), how many things had each fate."""

IMAGE, MASK, TABLE, SAMPLE = "image", "mask", "table", "sample"
HIDDEN = "left out: hidden, or left behind by an operating system"
NO_FILE = "left out: neither a file nor a folder"
LOOP = "left out: a link to a folder above it"
AGAIN = "left out: the archive holds it again, later"
UNREADABLE = "left out: unreadable"
NO_IMAGE = "left out: no image by its name"

_NAMED = 3


class Account:
    """What was found of each unit, and what became of it. The first fate of a thing stands."""

    def __init__(self) -> None:
        self._fates: dict[str, dict[str, str]] = {}
        self._counts: dict[str, Counter[str]] = {}

    def found(self, unit: str, names: Iterable[str]) -> None:
        """Things that are there, by names that distinguish them; found twice they count once."""
        fates = self._fates.setdefault(unit, {})
        for name in names:
            fates.setdefault(name, "")

    def became(self, unit: str, name: str, fate: str) -> None:
        """The fate of one thing that was found."""
        fates = self._fates[unit]
        fates[name] = fates[name] or fate

    def rest(self, unit: str, fate: str) -> list[str]:
        """The fate of everything that has none yet; their names."""
        fates = self._fates.get(unit, {})
        names = [name for name, known in fates.items() if not known]
        fates.update(dict.fromkeys(names, fate))
        return names

    def count(self, unit: str, fate: str, number: int = 1) -> None:
        """Things of one fate that are counted and have no names."""
        self._counts.setdefault(unit, Counter())[fate] += number

    def totals(self) -> Totals:
        """How many things of each unit had each fate.

        Raises:
            UserError: something has none; with the names.
        """
        totals: Totals = {}
        for unit, fates in self._fates.items():
            lost = [name for name, fate in fates.items() if not fate]
            if lost:
                raise UserError(
                    f"account of {unit}: expected each of {len(fates)} to be used or left out for a reason, "
                    f"found {len(lost)} of which neither is known ({'; '.join(lost[:_NAMED])}). "
                    "The importer must say what becomes of them."
                )
            totals[unit] = dict(Counter(fates.values()))
        for unit, counts in self._counts.items():
            of_unit = totals.setdefault(unit, {})
            for fate, number in counts.items():
                of_unit[fate] = of_unit.get(fate, 0) + number
        return totals
