"""Text of unknown origin on its way to a terminal or a table."""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    r"""The text with every control character, and what turns the direction of writing, as an escape.

    >>> printable("cat\x1b[2J"), printable("Bär")
    ('cat\\x1b[2J', 'Bär')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cell(text: str) -> str:
    """The text as a cell of a table, which no spreadsheet takes for a formula.

    >>> cell("=1+1"), cell("-0.5"), cell("cat")
    ("'=1+1", '-0.5', 'cat')
    """
    if not text.startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
