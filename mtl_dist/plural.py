"""Numbers of things in messages."""

from __future__ import annotations


def plural(num: int, noun: str, many: str = "") -> str:
    """The number and its noun: 1 rank, 1,234 ranks; `many` is a plural that is not formed by an s."""
    return f"{num:,} {noun if num == 1 else many or noun + 's'}"
