"""Small JSON files: what stands in them is what was written, or they are damaged, in one line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class DamagedFile(ValueError):
    """A file is not what was written; the message says why, in one line, without naming the file."""


def parsed(kind: type[T], content: bytes | str) -> T:
    """The value that the JSON text `content` holds, of exactly the type `kind`, such as a dataclass.

    Raises:
        DamagedFile: it is no JSON, or of another type.
    """
    hashable: Any = kind  # which mypy does not know of a type
    try:
        value: T = _adapter(hashable).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedFile(f"{where}: {first['msg']}" if where else first["msg"]) from None
    return value


def read_json(kind: type[T], path: Path) -> T | None:
    """What the file at `path` holds; None where there is none.

    Raises:
        DamagedFile: it is no JSON, or of another type.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFile(error.strerror or str(error)) from None
    return parsed(kind, content)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
