"""The `fields` of a recipe: which tasks stand where in WebDataset tars that someone else wrote."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field, create_model

from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vocabulary import MISSING


def _known(kind: str) -> str:
    try:
        return kind_of(kind).name
    except UserError as error:
        raise ValueError(str(error)) from None


KindName: TypeAlias = Annotated[str, AfterValidator(_known)]

# A class body cannot have a field called `from`, a word of the language.
_WithFrom = create_model("_WithFrom", __base__=Settings, **{"from": (str, ...)})  # type: ignore[call-overload]


class FieldSettings(_WithFrom):
    """A task that is a field of the samples in external tars.

    from      the field: cls, txt, json:breed, meta.json:dog.breed; a mask's extension, such as seg.png
    classes   the class names by index; without them those that are found
    unit      of a number, such as years
    """

    kind: KindName
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    unit: str = ""


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
