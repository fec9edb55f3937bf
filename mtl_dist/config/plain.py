"""A recipe written in Python, as YAML would hold it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from mtl_dist.config.errors import Location, dotted
from mtl_dist.errors import UserError


def plain(value: Any, location: Location = ()) -> Any:
    """Mappings, lists, text, numbers and null; tuples, paths, NumPy's numbers and settings become such.

    Raises:
        UserError: something else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item, (*location, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, (*location, number)) for number, item in enumerate(value)]
    raise UserError(
        f"{dotted(location) or 'recipe'}: expected a number, text, a path, a list or a dictionary, "
        f"found {type(value).__name__}."
    )
