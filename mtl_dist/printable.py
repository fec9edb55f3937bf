"""Text of unknown origin on its way to a terminal or a table."""

from __future__ import annotations

import sys
from typing import IO

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    r"""The text with every control character, and what turns the direction of writing, as an escape.

    >>> printable("cat\x1b[2J"), printable("Bär")
    ('cat\\x1b[2J', 'Bär')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines: line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t\r" else printable(c) for c in text)


def say(text: str, file: IO[str] | None = None) -> None:
    """Print lines of unknown origin, to standard output where no `file` is named, by `printable`."""
    for line in text.splitlines() or [""]:
        print(printable(line), file=file or sys.stdout, flush=True)


def cell(text: str) -> str:
    """The text as a cell of a table, which no spreadsheet takes for a formula.

    >>> cell("=1+1"), cell("-0.5"), cell("-1;-2"), cell("cat")
    ("'=1+1", '-0.5', '-1;-2', 'cat')
    """
    if not text.startswith(_FORMULA):
        return text
    try:
        for number in text.split(";"):
            float(number)
    except ValueError:
        return f"'{text}"
    return text


def text_of_cell(written: str) -> str:
    """The text that `cell` wrote.

    >>> text_of_cell("'=1+1"), text_of_cell("'tis"), text_of_cell("-0.5")
    ('=1+1', "'tis", '-0.5')
    """
    bare = written.removeprefix("'")
    return bare if bare != written and cell(bare) == written else written
