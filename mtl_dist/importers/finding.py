"""Finding the files that a table speaks of: by path, by the end of a path, by stem."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath

from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.errors import UserError
from mtl_dist.importers.sources import Source, Tree, is_hidden
from mtl_dist.importers.splitting import split_name
from mtl_dist.importers.summary import listed

_IMAGES = "images"
"""Where a name is found in several folders, one of this name is meant."""


class FileFinder:
    """Finds files of a tree by what a table in its `folder` says of them."""

    def __init__(self, tree: Tree, folder: str) -> None:
        self.tree = tree
        self._folder = folder

    def find(self, path: str, split: str) -> tuple[str, Source] | None:
        """The file at `path`, or the only one whose path ends so; its path in the tree and its source.

        A name may lack its extension: then it is an image of that stem.

        Among several, those in a folder "images" come first, then those in a folder of the row's `split`.

        Raises:
            UserError: several files remain.
        """
        for known in dict.fromkeys((self._folder + path, path)):
            found = self.tree.find(known)
            if found is not None:
                return known, found
        parts = PurePosixPath(path).parts
        if (home := self.tree.root.resolve().name) in parts[:-1]:  # a path from above the tree
            below = PurePosixPath(*parts[len(parts) - parts[::-1].index(home) :])
            if (found := self.tree.find(str(below))) is not None:
                return str(below), found
        if "\\" in path and (found_so := self.find(path.replace("\\", "/"), split)):  # as Windows writes it
            return found_so
        ending = f"/{str(PurePosixPath(path)).lstrip('/')}"
        candidates = [name for name in self._by_name[PurePosixPath(path).name] if f"/{name}".endswith(ending)]
        candidates = candidates or [
            name
            for name in self._by_stem[PurePosixPath(path).name]
            if f"/{PurePosixPath(name).with_suffix('')}".endswith(ending)
        ]
        for folder in (_IMAGES, split):
            in_folder = [
                name for name in candidates if folder in map(split_name, PurePosixPath(name).parts[:-1])
            ]
            candidates = in_folder if len(candidates) > 1 and in_folder else candidates
        if not candidates:
            return None
        if len(candidates) > 1:
            raise UserError(
                f"{self.tree}: expected one file called {path!r}, found {', '.join(candidates[:3])}. "
                "Give longer paths in the table."
            )
        return candidates[0], self.tree.source(candidates[0])

    def holds(self, path: str) -> bool:
        """Whether there is a file that `find` may find, or several."""
        name = PurePosixPath(path).name
        if name in self._by_name or name in self._by_stem:
            return True
        return any(self.tree.find(known) is not None for known in (self._folder + path, path))

    def not_found(self, path: str) -> str:
        """What was looked for and where, when `find` found nothing."""
        name = PurePosixPath(path).name
        here = listed(self.tree.files) or "nothing"
        stem = PurePosixPath(name.replace("\\", "/")).stem.casefold()
        near = next((file for file in self.tree.files if PurePosixPath(file).stem.casefold() == stem), "")
        return (
            f"in {self.tree}, found no such file: neither {self._folder + path}, nor {name} in another "
            f"folder, nor a picture {name} of any extension. "
            + (f"Did you mean {near}?" if near else f"It holds {here}.")
        )

    @cached_property
    def _by_name(self) -> defaultdict[str, list[str]]:
        by_name: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.tree.files:
            by_name[PurePosixPath(name).name].append(name)
        return by_name

    @cached_property
    def _by_stem(self) -> defaultdict[str, list[str]]:
        by_stem: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.tree.files:
            if extension_of(name) in IMAGE_EXTENSIONS:
                by_stem[PurePosixPath(name).stem].append(name)
        return by_stem


class MaskFolder:
    """Finds the mask of an image by its stem, below one folder of a tree or on disk.

    Raises:
        UserError: no such folder.
    """

    def __init__(self, tree: Tree, folder: str, columns: tuple[str, ...]) -> None:
        wanted = folder.strip("/").removeprefix("./")
        folders = [name for name in tree.directories if f"/{name}".endswith(f"/{wanted}")]
        is_root = wanted == "." or (not tree.is_archive and Path(folder).resolve() == tree.root.resolve())
        if is_root and len(folders) != 1:
            self.tree, prefix = tree, ""
        elif len(folders) == 1:
            self.tree, prefix = tree, f"{folders[0]}/"
        elif not folders and Path(folder).is_dir():
            self.tree, prefix = Tree(Path(folder)), ""
        else:
            raise UserError(
                f"masks {folder!r}: expected a column of the table or one folder in {tree}, found "
                f"{', '.join(folders) or 'neither'}. Columns: {', '.join(columns)}; folders: "
                f"{listed(tree.directories) or 'none'}. A pattern holds braces: "
                f"'{{id}}_{folder.rpartition('/')[2]}.png'."
            )
        self.files = [
            name
            for name in self.tree.files
            if name.startswith(prefix) and extension_of(name) in IMAGE_EXTENSIONS
        ]
        self._by_stem: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.files:
            self._by_stem[PurePosixPath(name).stem].append(name)

    def find(self, image: str, source: Source) -> Source | None:
        """The mask of the image at this path, or None; of several the one whose folder is called as its.

        Raises:
            UserError: several masks remain.
        """
        path = PurePosixPath(image)
        candidates = self._by_stem[path.stem]
        if image in candidates:  # in a folder of images and masks
            candidates = [name for name in candidates if self.tree.source(name) != source]
        if len(candidates) > 1:
            candidates = [name for name in candidates if PurePosixPath(name).parent.name == path.parent.name]
        if len(candidates) > 1:
            raise UserError(f"{image}: expected one mask, found {', '.join(candidates[:3])}.")
        return self.tree.source(candidates[0]) if candidates else None


def files_beside(tree: Tree, images: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files in the folders of the images (of an archive all), by path; and the hidden ones."""
    if tree.is_archive:
        return list(tree.files), list(tree.left_out)
    beside: list[str] = []
    hidden: list[str] = []
    for folder in sorted({os.path.dirname(path) for path in images}):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    (hidden if is_hidden(entry.name) else beside).append(entry.path)
    return beside, hidden
