"""A copy of the code at submission, so that later edits do not change a queued job.

This package, and the user's modules: those of the recipe's user-defined parts and what these import
(`config/user_modules.py`). The copy comes first on the ranks' import path. What is installed is imported from
where it is when the job starts.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mtl_dist
from mtl_dist.config.user_modules import hash_of, is_spread, sources_in, user_modules


def take_snapshot(directory: Path) -> dict[str, str]:
    """Copy the code into `directory`; the hash of each of the user's modules there, by its file's name."""
    own = [place for places in user_modules().values() for place in places]
    directory.mkdir(parents=True, exist_ok=True)
    for place in [Path(mtl_dist.__file__).parent, *own]:
        if place.is_file():
            shutil.copy2(place, directory)
        elif is_spread(place):
            for source in sources_in([place]):
                target = directory / source.relative_to(place.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        else:
            shutil.copytree(place, directory / place.name, ignore=_without(directory), dirs_exist_ok=True)
    return {place.name: hash_of(directory / place.name) for place in own}


def _without(directory: Path) -> Callable[[str, list[str]], set[str]]:
    """What is not copied: hidden and compiled files, and the runs, where they lie in the package itself."""
    hidden = shutil.ignore_patterns("__pycache__", ".*")

    def ignored(folder: str, names: list[str]) -> set[str]:
        runs = {name for name in names if directory.resolve().is_relative_to(Path(folder, name).resolve())}
        return hidden(folder, names) | runs

    return ignored


def differences(directory: Path, hashes: Mapping[str, str]) -> Iterator[str]:
    """What of a snapshot is another than at submission, and which of the user's modules is not from it.

    To be asked when the recipe, and so the user's parts, are loaded.
    """
    for name, before in hashes.items():
        place = directory / name
        if not place.exists() or hash_of(place) != before:
            yield f"{place}: another source than at submission"
    for name, places in user_modules().items():
        if name in sys.modules and not places[0].resolve().is_relative_to(directory.resolve()):
            yield f"module {name}: imported from {places[0]}, not from the copy of the submission"
