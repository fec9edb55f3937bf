"""The user's own modules: those of user-defined parts and what these import, neither Python's nor installed.

What was really imported counts, by whatever name or trick; and what their sources import, also within
functions, because that may be imported later.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from mtl_dist.durable import sha256_of

_INSTALLED = ("site-packages", "dist-packages")

_brought_in: set[str] = set()


def remember(names: Iterable[str]) -> None:
    """These modules were imported for a user-defined part."""
    _brought_in.update(names)


def user_modules(of: Iterable[str] | None = None) -> dict[str, list[Path]]:
    """Where the user's modules and packages lie, by the first part of their names; all, or `of` these.

    One file or folder each; several folders for a package that is spread over them (without `__init__.py`).
    """
    found: dict[str, list[Path]] = {}
    seen: set[str] = set()
    todo = {name.partition(".")[0] for name in (_brought_in if of is None else of)}
    while todo:
        name = todo.pop()
        seen.add(name)
        places = _places_of(name)
        if places:
            found[name] = places
            for source in sources_in(places):
                todo |= _imports_of(source, source.stat().st_mtime_ns) - seen
    return dict(sorted(found.items()))


def imported_hashes() -> dict[str, str]:
    """The SHA-256 of the source of each of the user's modules that is imported now, by its name."""
    hashes = {}
    script = sys.modules.get("__main__")  # multiprocessing gives it a second name
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if module is not script and file and _is_users(file) and os.path.isfile(file):
            hashes[name] = sha256_of(Path(file))
    return hashes


def hash_of(place: Path) -> str:
    """One SHA-256 of all sources of a module or package, with their names."""
    digest = hashlib.sha256()
    for source in sorted(sources_in([place])):
        digest.update(f"{source.relative_to(place.parent)} {sha256_of(source)}\n".encode())
    return digest.hexdigest()


def is_spread(place: Path) -> bool:
    """Whether a folder is a package without `__init__.py`, beside whose sources anything may lie."""
    return place.is_dir() and not (place / "__init__.py").is_file()


def sources_in(places: Iterable[Path]) -> Iterator[Path]:
    """The Python sources of modules and packages."""
    for place in places:
        if place.is_file():
            yield place
            continue
        for source in place.rglob("*.py"):
            if not any(part.startswith(".") for part in source.relative_to(place).parts):
                yield source


def _places_of(name: str) -> list[Path]:
    """Where a module lies that is the user's own; nothing of any other."""
    module = sys.modules.get(name)
    folders: list[str] = []
    if module is not None:
        file, folders = getattr(module, "__file__", None), list(getattr(module, "__path__", []))
    else:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return []
        # A folder of that name somewhere on the path need not be what is meant: nobody has imported it.
        file = spec.origin if spec is not None and spec.has_location else None
    if file is not None:
        folders = [os.path.dirname(file) if Path(file).stem == "__init__" else file]
    return [Path(folder) for folder in folders if os.path.exists(folder) and _is_users(folder)]


def _is_users(file: str) -> bool:
    path = os.path.abspath(file)
    if any(f"{os.sep}{part}{os.sep}" in path for part in _INSTALLED) or path.startswith(_others()):
        return False
    return not os.path.realpath(path).startswith(_others())


@cache
def _others() -> tuple[str, ...]:
    """Where Python's own modules and this package lie."""
    paths = sysconfig.get_paths()
    places = [paths["stdlib"], paths["platstdlib"], str(Path(__file__).parents[1])]
    return tuple(f"{place}{os.sep}" for each in places for place in (each, os.path.realpath(each)))


@cache
def _imports_of(source: Path, version: int) -> frozenset[str]:
    """The first parts of the names of what a source imports, also within its functions."""
    if source.suffix != ".py":
        return frozenset()
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return frozenset()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return frozenset(name.partition(".")[0] for name in names)
