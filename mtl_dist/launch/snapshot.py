"""A copy of the code at submission, so that later edits do not change a queued job.

This package, and of the working directory whatever the recipe names by an import path. The copy comes first
on the ranks' import path. Anything else is imported from where it is when the job starts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mtl_dist

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")


def take_snapshot(directory: Path, recipe: Any, working_directory: Path) -> list[str]:
    """Copies the code into `directory`, and says which modules it took.

    `recipe` is the resolved recipe as plain values.
    """
    sources = {"mtl_dist": Path(mtl_dist.__file__).parent}
    for name in sorted(_named_modules(recipe)):
        for source in (working_directory / name, working_directory / f"{name}.py"):
            if source.exists() and name not in sources:
                sources[name] = source
    directory.mkdir(parents=True, exist_ok=True)
    for source in sources.values():
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, directory / source.name, ignore=ignored)
        else:
            shutil.copy2(source, directory)
    return sorted(sources)


def _named_modules(values: Any) -> Iterator[str]:
    """The first name of every import path among the values: `my_project` of `my_project.losses.Tversky`."""
    if isinstance(values, dict):
        for value in values.values():
            yield from _named_modules(value)
    elif isinstance(values, list):
        for value in values:
            yield from _named_modules(value)
    elif isinstance(values, str) and _IMPORT_PATH.match(values):
        yield values.split(".")[0]
