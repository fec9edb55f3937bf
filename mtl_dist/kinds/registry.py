"""All kinds of task by name; user-defined ones by their import path."""

from __future__ import annotations

import re
from functools import lru_cache

from mtl_dist.config.nearest import nearest
from mtl_dist.errors import UserError
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.depth import Depth
from mtl_dist.kinds.keypoints import Keypoints
from mtl_dist.kinds.kind import Kind, MapKind, ScalarKind
from mtl_dist.kinds.multilabel import Multilabel
from mtl_dist.kinds.normals import Normals
from mtl_dist.kinds.ordinal import Ordinal
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.segmentation import Segmentation
from mtl_dist.kinds.vector import Vector

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Classification(),
        Multilabel(),
        Regression(),
        Segmentation(),
        Depth(),
        Normals(),
        Ordinal(),
        Keypoints(),
        Vector(),
    )
}

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def kind_of(name: str) -> Kind:
    """The kind called `name`: a built-in one, or a class derived from `ScalarKind` or `MapKind`.

    Raises:
        UserError: no such kind.
    """
    return KINDS[name] if name in KINDS else _user_defined(name)


def scalar_kind(name: str) -> ScalarKind:
    """The kind called `name`, whose labels are known not to be maps."""
    kind = kind_of(name)
    assert isinstance(kind, ScalarKind), name
    return kind


def map_kind(name: str) -> MapKind:
    """The kind called `name`, whose labels are known to be maps."""
    kind = kind_of(name)
    assert isinstance(kind, MapKind), name
    return kind


@lru_cache(maxsize=64)
def _user_defined(path: str) -> Kind:
    if not _IMPORT_PATH.fullmatch(path):
        near = nearest(path, KINDS)
        raise UserError(
            f"kind: expected one of {', '.join(KINDS)} or the import path of a class, found {path!r}."
            f"{f' Did you mean {near}?' if near else ''}"
        )
    from mtl_dist.config.user_defined import PartError, imported  # pydantic is slow to import

    try:
        found = imported(path, is_kind)
    except PartError as error:
        raise UserError(f"kind: {error}") from None
    if not is_kind(found):
        raise UserError(f"kind: expected a subclass of mtl_dist.kinds.kind.Kind, found {path}.")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise UserError(f"kind: expected {', '.join(missing)} defined in {path}, found none.")
    kind: Kind = found()
    return kind


def is_kind(value: object) -> bool:
    """Whether a value is a class of labels."""
    return isinstance(value, type) and issubclass(value, ScalarKind | MapKind)
