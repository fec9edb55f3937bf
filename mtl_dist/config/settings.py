"""The base of every settings class: typed, frozen, strict."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """One section of a recipe or of a cluster profile.

    A default is an annotated field of the class, which stands beside the code that uses it. Unknown keys,
    implicit conversions ("3" for 3) and changes after construction are errors. Lists in YAML fill
    `tuple[...]` fields.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
