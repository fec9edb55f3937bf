"""Numbers and lists in messages."""

from __future__ import annotations

from collections.abc import Sequence


def plural(num: int, noun: str, many: str = "") -> str:
    """The number and its noun: 1 rank, 1,234 ranks; `many` is a plural that is not formed by an s."""
    return f"{num:,} {noun if num == 1 else many or noun + 's'}"


def readable(value: float) -> str:
    """A loss or a metric, short enough for a table also where it has exploded; 0.0000 is 0 alone.

    >>> readable(0.71236), readable(-0.0), readable(2714814840389.2), readable(2.4e-10)
    ('0.7124', '0.0000', '2.715e+12', '2.4e-10')
    """
    return f"{value:.4g}" if abs(value) >= 1e6 or 0 < abs(value) < 5e-5 else f"{value:z.4f}"


def first_few(items: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first items, and how many more there are.

    >>> first_few(["a", "b", "c"], most=2), first_few(["a", "b"], most=2)
    ('a, b and 1 more', 'a, b')
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + more
