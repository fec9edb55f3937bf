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


def percentile_pair(option: str, text: str) -> tuple[float, float]:
    """The two numbers of `1,99`.

    Raises:
        UserError: they are not two numbers.
    """
    found = numbers(text)
    if found is None or len(found) != 2:
        raise UserError(f'{option}: expected two percentiles such as 1,99, found "{text}".')
    return found[0], found[1]


def stacks_by_split(option: str, text: str) -> dict[str, str] | None:
    """The split of each stack that `val=sw,nw;test=ne` names; None where it is a column's name.

    Raises:
        UserError: a stack in two splits, or a split without one.
    """
    if "=" not in text:
        return None
    splits: dict[str, str] = {}
    for part in text.split(";"):
        split, _, names = part.partition("=")
        for name in names.split(","):
            if not split.strip() or not name.strip():
                raise UserError(f'{option}: expected SPLIT=STACK,... with ; between splits, found "{text}".')
            if splits.setdefault(name.strip(), split.strip()) != split.strip():
                raise UserError(f"{option}: expected each stack in one split, found {name.strip()} in two.")
    return splits


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
