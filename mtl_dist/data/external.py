"""The `fields` of a recipe: which tasks stand where in WebDataset tars that someone else wrote.

Also how tars, images and labels in them are named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field, create_model

from mtl_dist.config.settings import Settings
from mtl_dist.data.images import IMAGE_EXTENSIONS
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vocabulary import MISSING, Cell, ClassNames, class_value


def _known(kind: str) -> str:
    try:
        return kind_of(kind).name
    except UserError as error:
        raise ValueError(str(error)) from None


def _by_value(names: dict[str, str]) -> dict[str, str]:
    for value in names:
        if class_value(value) is None:
            raise ValueError(f"expected a value from 0 on, or a colour such as #804080, found {value!r}")
    return names


KindName: TypeAlias = Annotated[str, AfterValidator(_known)]

_Classes: TypeAlias = (
    Annotated[tuple[str, ...], Field(min_length=2)]
    | Annotated[dict[str, str], Field(min_length=2), AfterValidator(_by_value)]
)

# A class body cannot have a field called `from`, a word of the language.
_WithFrom = create_model("_WithFrom", __base__=Settings, **{"from": (str, "")})  # type: ignore[call-overload]


class FieldSettings(_WithFrom):
    """A task that is a field of the samples in external tars, or of those of a Dataset.

    from      the field: cls, txt, json:breed, meta.json:dog.breed; a mask's extension, such as seg.png; of a
              Dataset the place in a sample: breed, 1, 1.breed (where it says that itself, nothing)
    classes   the class names by index, or by the values that stand for them (0: background, 255: cell);
              without them those that are found
    unit      of a number, such as years
    """

    kind: KindName
    classes: _Classes | None = None
    unit: str = ""

    @property
    def class_names(self) -> ClassNames | None:
        """The names by index, or by the numbers that stand for them."""
        if not isinstance(self.classes, dict):
            return self.classes
        return {number: n for value, n in self.classes.items() if (number := class_value(value)) is not None}


class Indexing(Settings):
    """How external tars are indexed: what `mtl index` takes as options.

    split, val, group, stratify, seed   fractions, a field such as json:fold, or the split of all tars; the
                                        share of train held out; the field of groups; the task to balance by
    missing, separator, strict          the words that mean "no label", what separates classes, and whether
                                        two texts for one class are refused
    max_skipped, verify                 samples that may be left out; whether every image is decoded once
    """

    split: str | None = None
    val: Annotated[float, Field(gt=0, lt=1)] | None = None
    group: str = ""
    stratify: str = ""
    seed: int = 0
    missing: tuple[str, ...] = MISSING
    separator: str = "|"
    strict: bool = False
    max_skipped: Annotated[int, Field(ge=0)] = 0
    verify: bool = True


Fields: TypeAlias = Annotated[dict[str, FieldSettings], Field(min_length=1)]

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class LabelField:
    """Where a label stands in a sample: the member with an extension, or a value inside its JSON.

    Written `cls`, `txt`, `json:age` or `meta.json:person.age`.
    """

    extension: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.extension, ".".join(self.path))) if self.path else self.extension

    @staticmethod
    def parse(text: str) -> LabelField:
        """The field of a text; extensions are compared in lower case, as WebDataset does."""
        extension, _, path = text.partition(":")
        return LabelField(extension.lower().lstrip("."), tuple(path.split(".")) if path else ())

    def cell(self, members: Mapping[str, bytes], nested: bool = False) -> Cell:
        """The value in a sample as text, "" where it has none; a list where JSON has one; with `nested` its
        items may be lists as well, which come as texts.

        Raises:
            ValueError: the member is no text, no JSON, or its value is an object.
        """
        data = members.get(self.extension)
        if data is None:
            return ""
        if not self.path and not self.extension.endswith("json"):
            return data.decode("utf-8-sig").strip()
        value = json.loads(data, parse_float=str, parse_constant=str)
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, list):
            return [json.dumps(item) if nested and isinstance(item, list) else _text(item) for item in value]
        return _text(value)


def image_extensions(stated: Sequence[str]) -> tuple[str, ...]:
    """The extensions that an image may have: those that are stated, else all usual ones."""
    return tuple(part.strip().lower().lstrip(".") for part in stated) or tuple(sorted(IMAGE_EXTENSIONS))


def expanded(name: str) -> list[str]:
    """The names that a name with {000..099} stands for."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    names = [f"{name[: match.start()]}{n:0{len(first)}d}{name[match.end() :]}" for n in numbers]
    return [full for name in names for full in expanded(name)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict | list):
        raise ValueError(f"found {type(value).__name__} where one value is expected")
    return value.strip() if isinstance(value, str) else json.dumps(value)
