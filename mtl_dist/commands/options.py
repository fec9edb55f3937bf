"""Option values that typer has no type for: `TASK=COLUMN`, fractions, class names."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_dist.errors import UserError


def named(option: str, values: Sequence[str] | None, what: str = "COLUMN") -> dict[str, str]:
    """The `TASK=WHAT` values of an option, by task.

    Raises:
        UserError: one has another form, or a task appears twice.
    """
    pairs: dict[str, str] = {}
    for text in values or ():
        task, equals, value = text.partition("=")
        if not (task and equals and value):
            raise UserError(f'{option}: expected TASK={what}, found "{text}".')
        if task in pairs:
            raise UserError(f"{option}: expected each task once, found {task} twice.")
        pairs[task] = value
    return pairs


def words(option: str, text: str) -> list[str]:
    """The words of `coarse,fine`.

    Raises:
        UserError: one is empty.
    """
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise UserError(f'{option}: expected words with commas between them, found "{text}".')
    return found
