"""What data and users say of a task's labels: its classes, in which words, and what is wrong with a label."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

from mtl_dist.config.nearest import nearest
from mtl_dist.plural import first_few
from mtl_dist.specs import IGNORE

Cell: TypeAlias = str | list[str]
"""One value as text without surrounding space, "" where it is missing; a list where JSON has one."""

MISSING = ("NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null")
"""The words that mean "no label" where nothing else is said; of every kind, from every source."""

_WHOLE = re.compile(r"([+-]?\d+)(\.0*)?")
_DECIMAL = re.compile(r"-?\d+(\.\d*)?")
_TRUTH = ("true", "false")
_MARK = "\ufeff"

IGNORED = "-"
"""In place of a class name: the value is no label."""
COLOUR = 1 << 24
"""From here on a value of a mask is a colour: this and red, green and blue as one number."""
_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")

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
    missing    the words that mean "no label"; a class of such a name, when declared, is one
    strict     whether two texts for one class are refused instead of reported
    """

    classes: ClassNames | None = None
    unit: str = ""
    separator: str = "|"
    facts: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = MISSING
    strict: bool = False

    @property
    def missing_words(self) -> frozenset[str]:
        """The words that mean "no label", those that name a class left out."""
        names = () if self.classes is None else names_of(self.classes)
        return frozenset(map(plain, self.missing)) - frozenset(map(plain, names))

    @property
    def class_values(self) -> dict[int, int]:
        """The class index of each value that stands for a class; empty where the classes have no values."""
        if not isinstance(self.classes, Mapping):
            return {}
        named = [value for value, name in self.classes.items() if name != IGNORED]
        return {value: IGNORE for value in self.classes} | {value: i for i, value in enumerate(named)}


@dataclass(frozen=True)
class Vocabulary:
    """Class names, the index for each way to say a class (its name, a number), and the separator in cells.

    `alike` are indices by what texts have in common that mean the same: `true` of `True` and `TRUE`, `1` of
    `1` and `1.0`.
    """

    names: tuple[str, ...] = ()
    index_of: Mapping[str | int, int] = field(default_factory=dict)
    separator: str = "|"
    alike: Mapping[str, int] = field(default_factory=dict)

    def index(self, text: str) -> int:
        """The class that a text names: by its name, by another spelling of it, or by a number.

        Raises:
            LabelError: none of these.
        """
        text = plain(text)
        if text in self.index_of:
            return self.index_of[text]
        if (common := meaning(text)) in self.alike:
            return self.alike[common]
        number = whole_number(text)
        if number is not None and number in self.index_of:
            return self.index_of[number]
        listing = ", ".join(self.names)
        numbers = sorted(value for value in self.index_of if isinstance(value, int))
        if number is not None and numbers:
            raise LabelError(f"a class index from {numbers[0]} to {numbers[-1]} ({listing})", text)
        near = nearest(text, self.names)
        raise LabelError(f"a class of {listing}", repr(text), f"Did you mean {near!r}?" if near else "")

    def spellings(self, terms: Mapping[str, int]) -> list[str]:
        """What is to be said of texts (with counts) that are one class, and of names that look alike."""
        by_class: defaultdict[int, Counter[str]] = defaultdict(Counter)
        for text, count in terms.items():
            by_class[self.index(text)][text] += count
        said = [
            f"texts that are one class, {self.names[index]!r}: {_counted(texts)}"
            for index, texts in sorted(by_class.items())
            if len(texts) > 1
        ]
        folded: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.names:
            folded[name.casefold()].append(name)
        apart = [" / ".join(names) for names in folded.values() if len(names) > 1]
        return [*said, *([f"classes that differ only in case: {', '.join(apart)}"] if apart else [])]

    def merged(self, terms: Iterable[str]) -> tuple[str, ...]:
        """The texts of the first class that several name, if there is one."""
        by_class: defaultdict[int, set[str]] = defaultdict(set)
        for text in terms:
            by_class[self.index(text)].add(text)
        return next((tuple(sorted(texts)) for texts in by_class.values() if len(texts) > 1), ())


def vocabulary(declared: Declared, terms: Mapping[str, int] | None = None) -> Vocabulary:
    """The words for the classes that are declared, else for those that the `terms` in the data name, counted.

    A name is a text, kept to the letter. Texts of one meaning (see `meaning`) are one class, called by the
    shortest of them, of these the most frequent.
    """
    if declared.classes is None:
        forms: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for text, count in (terms or {}).items():
            forms[meaning(text)][plain(text)] += count
        called = {
            common: min(texts, key=lambda text: (len(text), -texts[text], text))
            for common, texts in forms.items()
        }
        names = tuple(class_order(called.values()))
        index_of: dict[str | int, int] = {name: index for index, name in enumerate(names)}
        alike = {common: index_of[name] for common, name in called.items()}
        return Vocabulary(names, index_of, declared.separator, alike)
    names = names_of(declared.classes)
    values: Sequence[int] = range(len(names))
    if isinstance(declared.classes, Mapping):
        values = [value for value, name in declared.classes.items() if name != IGNORED]
    by_text: dict[str | int, int] = {value: index for index, value in enumerate(values)}
    by_text |= {plain(name): index for index, name in enumerate(names)}
    common = Counter(map(meaning, names))
    alike = {meaning(name): index for index, name in enumerate(names) if common[meaning(name)] == 1}
    return Vocabulary(names, by_text, declared.separator, alike)


def plain(text: str) -> str:
    """A text as it is compared: in Unicode's composed form, without space and byte-order marks around it."""
    return unicodedata.normalize("NFC", text.strip().strip(_MARK).strip())


def meaning(text: str) -> str:
    """What texts of one class have in common: `1` of `1`, `1.` and `1.0`; `true` of `True` and `TRUE`."""
    text = plain(text)
    if match := _WHOLE.fullmatch(text):
        return match[1]
    return text.casefold() if text.casefold() in _TRUTH else text


def _counted(texts: Mapping[str, int]) -> str:
    """Texts with their counts; those that look the same are distinguished by their code points."""
    looks = Counter(plain(text) for text in texts)
    shown = [
        f"{text!r} ({texts[text]:,})" if looks[plain(text)] == 1 else f"{text!a} ({texts[text]:,})"
        for text in sorted(texts)
    ]
    return first_few(shown)


def names_of(classes: ClassNames) -> tuple[str, ...]:
    """The names by index; classes by value come in the order in which they are stated."""
    if not isinstance(classes, Mapping):
        return tuple(classes)
    return tuple(name for name in classes.values() if name != IGNORED)


def class_value(text: str) -> int | None:
    """The number in a text for which a class stands, such as a value of masks; or a colour."""
    return int(text) if text.isdecimal() else colour_value(text)


def colour_value(text: str) -> int | None:
    """The value that stands for a colour such as `#804080`; None where the text is none."""
    return COLOUR + int(text[1:], 16) if _COLOUR.fullmatch(text) else None


def colour_text(value: int) -> str:
    """The colour of a value, as `#804080`."""
    return f"#{value - COLOUR:06x}"


def class_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of their indices: by number where all are numbers, else by name."""
    unique = set(names)
    if all(_DECIMAL.fullmatch(name) for name in unique):
        return sorted(unique, key=lambda name: (Decimal(name), name))
    return sorted(unique)


def whole_number(text: str) -> int | None:
    """The whole number in a text, exactly; "3.0" is one: a column with gaps is often written so."""
    match = _WHOLE.fullmatch(text)
    return int(match[1]) if match else None


def one_value(cell: Cell) -> str:
    """The text of a cell that holds one value.

    Raises:
        LabelError: it holds a list.
    """
    if isinstance(cell, list):
        raise LabelError("one value", f"the list {cell}")
    return cell
