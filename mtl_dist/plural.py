"""Numbers in messages."""

from __future__ import annotations


def plural(num: int, noun: str, many: str = "") -> str:
    """The number and its noun: 1 rank, 1,234 ranks; `many` is a plural that is not formed by an s."""
    return f"{num:,} {noun if num == 1 else many or noun + 's'}"


def readable(value: float) -> str:
    """A loss or a metric, short enough for a table also where it has exploded.

    >>> readable(0.71236), readable(-0.00001), readable(2714814840389.2)
    ('0.7124', '0.0000', '2.715e+12')
    """
    return f"{value:z.4f}" if not abs(value) >= 1e6 else f"{value:.4g}"
