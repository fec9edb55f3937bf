"""Option values that typer has no type for: `TASK=COLUMN`, fractions, class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtl_dist.errors import UserError


def named(option: str, values: Sequence[str] | None, what: str = "COLUMN") -> dict[str, str]:
    """The `TASK=WHAT` values of an option, by task.

    Raises:
        UserError: one has another form, or a task stands twice.
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


def fractions(option: str, text: str) -> tuple[float, ...]:
    """The numbers of `0.8,0.1,0.1`.

    Raises:
        UserError: they are no numbers.
    """
    found = numbers(text)
    if found is None:
        raise UserError(f'{option}: expected fractions such as 0.8,0.1,0.1, found "{text}".')
    return found


def numbers(text: str) -> tuple[float, ...] | None:
    """The numbers of a text with commas, or None if it is something else (a column's name)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return None


def class_names(option: str, values: Sequence[str] | None) -> Mapping[str, Sequence[str] | Mapping[int, str]]:
    """Class names by task: `lesion=background,lesion` by index, `lesion=0:background,255:lesion` by value.

    Raises:
        UserError: one has another form.
    """
    classes: dict[str, Sequence[str] | Mapping[int, str]] = {}
    for task, text in named(option, values, "NAME,NAME,...").items():
        parts = [part.strip() for part in text.split(",")]
        pairs = [part.partition(":") for part in parts]
        by_value = [colon for _, colon, _ in pairs]
        valid = (
            all(name and value.strip().isdecimal() for value, _, name in pairs)
            if any(by_value)
            else all(parts)
        )
        if not valid:
            raise UserError(
                f'{option}: expected {task}=NAME,NAME,... or {task}=0:NAME,1:NAME,..., found "{text}".'
            )
        classes[task] = {int(value): name for value, _, name in pairs} if any(by_value) else parts
    return classes
