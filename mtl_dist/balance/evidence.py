"""When two tasks are said to conflict: not after one look at their gradients, which are noisy.

mean + 2 * standard error < CONFLICT,     over the cosines of at least `LOOKS` looks
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_dist.balance.diagnostics import GradientDiagnostics

CONFLICT = -0.1
"""Two tasks conflict where the mean cosine of their gradients is below this."""
DOMINANCE = 10.0
"""One gradient drowns another where it is longer by this factor."""
LOOKS = 5
"""The fewest looks from which anything is said."""
_REMEMBERED = 20


def is_conflict(cosines: Sequence[float]) -> bool:
    """Whether so many looks at two tasks show a conflict."""
    return len(cosines) >= LOOKS and fmean(cosines) + 2 * standard_error(cosines) < CONFLICT


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two values or more."""
    return stdev(values) / math.sqrt(len(values))


def conflict_sentence(first: str, second: str, cosines: Sequence[float]) -> str:
    """The evidence of a conflict, without a full stop."""
    below = sum(cosine < CONFLICT for cosine in cosines)
    return (
        f"{first} and {second} conflict: the mean cosine of their gradients is {fmean(cosines):z.2f} "
        f"(standard error {standard_error(cosines):.2f}), below {CONFLICT:g} in {below} of {len(cosines)} "
        "comparisons"
    )


class ConflictWatch:
    """Says once of each pair of tasks that it conflicts, when the last looks show it; and again if it starts
    to do so again."""

    def __init__(self) -> None:
        self._cosines: dict[tuple[str, str], deque[float]] = {}
        self._log_ratios: dict[tuple[str, str], deque[float]] = {}
        self._reported: set[tuple[str, str]] = set()

    def look(self, found: GradientDiagnostics) -> list[str]:
        """Take in one comparison; a sentence for each conflict that it makes evident."""
        sentences = []
        lengths = found.lengths_T.tolist()
        for i, first in enumerate(found.tasks):
            for j in range(i + 1, len(found.tasks)):
                pair, cosine = (first, found.tasks[j]), float(found.cosines_TT[i, j])
                if math.isnan(cosine):
                    continue
                cosines = self._cosines.setdefault(pair, deque(maxlen=_REMEMBERED))
                cosines.append(cosine)
                if lengths[i] > 0 and lengths[j] > 0:
                    ratios = self._log_ratios.setdefault(pair, deque(maxlen=_REMEMBERED))
                    ratios.append(math.log(lengths[i] / lengths[j]))
                if not is_conflict(cosines):
                    self._reported.discard(pair)
                elif pair not in self._reported:
                    self._reported.add(pair)
                    sentences.append(self._sentence(*pair))
        return sentences

    def _sentence(self, first: str, second: str) -> str:
        text = conflict_sentence(first, second, self._cosines[first, second])
        log_ratio = fmean(self._log_ratios[first, second])
        if abs(log_ratio) >= math.log(DOMINANCE):
            longer = first if log_ratio > 0 else second
            text += f", and {longer}'s gradient is {math.exp(abs(log_ratio)):.0f} times as long: it wins"
        return text + "."
