"""Names of files by a pattern over the columns of a row: `--image '{id}.jpg'`, `lesion='{id}_mask.png'`.

`{COLUMN}` is the cell of a column. For a mask `{id}` is also the name of the row's image without folder and
extension, and `{folder}` the image's folder, where no columns are called so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from mtl_dist.config.nearest import nearest
from mtl_dist.errors import UserError
from mtl_dist.kinds.vocabulary import Cell

_PLACE = re.compile(r"\{([^{}]*)\}")
ID, FOLDER = "id", "folder"


def is_pattern(text: str) -> bool:
    """Whether a text holds a place for a column."""
    return "{" in text and "}" in text


def columns_in(pattern: str) -> list[str]:
    """The columns that a pattern speaks of."""
    return _PLACE.findall(pattern)


def check_pattern(option: str, pattern: str, columns: Sequence[str], of_image: bool) -> None:
    """Refuse a pattern over columns that are not there; with `of_image` the image's name is one.

    Raises:
        UserError: with the nearest one that is.
    """
    known = [*columns, *((ID, FOLDER) if of_image else ())]
    for name in columns_in(pattern):
        if name not in known:
            near = nearest(name, known)
            also = " or {id}, the image's name without its extension," if of_image else ""
            raise UserError(
                f"{option} {pattern!r}: expected columns of the table ({', '.join(columns)}){also} in "
                f"braces, found {name!r}.{f' Did you mean {near!r}?' if near else ''}"
            )


def filled_in(pattern: str, cells: Mapping[str, Cell], image: str = "") -> str:
    """The name that a pattern gives for a row; nothing where a cell that it needs is empty."""
    known: dict[str, Cell] = dict(cells)
    if image:
        path = PurePosixPath(image)
        known = {ID: path.stem, FOLDER: path.parent.as_posix(), **known}
    found = [known[name] for name in columns_in(pattern)]
    if not all(isinstance(cell, str) and cell for cell in found):
        return ""
    return _PLACE.sub(lambda match: str(known[match[1]]), pattern)
