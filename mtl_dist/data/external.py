"""The `fields` of a recipe: which tasks stand where in WebDataset tars that someone else wrote."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field, create_model

from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of


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


Fields: TypeAlias = Annotated[dict[str, FieldSettings], Field(min_length=1)]
