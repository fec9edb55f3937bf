"""What data and users say of a task's labels: its classes, in which words, and what is wrong with a label."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mtl_dist.config.nearest import nearest

Cell: TypeAlias = str | list[str]
"""One value as text without surrounding space, "" where it is missing; a list where JSON has one."""

ClassNames: TypeAlias = Sequence[str] | Mapping[int, str]
"""The classes of a task: their names by index, or by the value that stands for them in the data."""


class LabelError(Exception):
    """A label that its task cannot have; the message does not say where it was found."""

    def __init__(self, expected: str, found: str, advice: str = "") -> None:
        super().__init__(f"expected {expected}, found {found}.{f' {advice}' if advice else ''}")
        self.expected = expected
        self.found = found


@dataclass(frozen=True)
class Declared:
    """What is said of a task before its labels are read.

    classes    its class names; None: those that are found
    unit       of its numbers
    separator  stands between the classes in a cell of several
    facts      what else the kind wants to know
    """

    classes: ClassNames | None = None
    unit: str = ""
    separator: str = "|"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_values(self) -> dict[int, int]:
        """The class index of each value that stands for a class; empty where the classes have no values."""
        if not isinstance(self.classes, Mapping):
            return {}
        return {value: index for index, value in enumerate(self.classes)}


@dataclass(frozen=True)
class Vocabulary:
    """Class names, the index for each way to say a class (its name, a number), and the separator in cells."""

    names: tuple[str, ...] = ()
    index_of: Mapping[str | int, int] = field(default_factory=dict)
    separator: str = "|"

    def index(self, text: str) -> int:
        """The class that a text names: by its name, or by a number.

        Raises:
            LabelError: none of these.
        """
        number = whole_number(text)
        if text in self.index_of:
            return self.index_of[text]
        if number is not None and number in self.index_of:
            return self.index_of[number]
        listing = ", ".join(self.names)
        if number is not None:
            numbers = sorted(value for value in self.index_of if isinstance(value, int))
            raise LabelError(f"a class index from {numbers[0]} to {numbers[-1]} ({listing})", text)
        near = nearest(text, self.names)
        raise LabelError(f"a class of {listing}", repr(text), f"Did you mean {near!r}?" if near else "")


def vocabulary(declared: Declared, terms: Iterable[str] = ()) -> Vocabulary:
    """The words for the classes that are declared, else for those that the `terms` in the data name.

    Where all terms are whole numbers, so are the names, and "3", "3.0" and " 3" are one class.
    """
    if declared.classes is None:
        unique = set(terms)
        numbers = {text: whole_number(text) for text in unique}
        if all(number is not None for number in numbers.values()):
            names = tuple(class_order(str(number) for number in numbers.values()))
            return Vocabulary(
                names, {int(name): index for index, name in enumerate(names)}, declared.separator
            )
        names = tuple(class_order(unique))
        return Vocabulary(names, {name: index for index, name in enumerate(names)}, declared.separator)
    names = names_of(declared.classes)
    values = list(declared.classes) if isinstance(declared.classes, Mapping) else range(len(names))
    index_of: dict[str | int, int] = {value: index for index, value in enumerate(values)}
    index_of |= {name: index for index, name in enumerate(names)}
    return Vocabulary(names, index_of, declared.separator)


def names_of(classes: ClassNames) -> tuple[str, ...]:
    """The names by index; classes by value come in the order in which they are stated."""
    return tuple(classes.values()) if isinstance(classes, Mapping) else tuple(classes)


def class_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of their indices: by number where all are numbers, else by name."""
    unique = set(names)
    if all(re.fullmatch(r"-?\d+", name) for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)


def whole_number(text: str) -> int | None:
    """The whole number in a cell; "3.0" is one: a column with gaps is often written so."""
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


def one_value(cell: Cell) -> str:
    """The text of a cell that holds one value.

    Raises:
        LabelError: it holds a list.
    """
    if isinstance(cell, list):
        raise LabelError("one value", f"the list {cell}")
    return cell
