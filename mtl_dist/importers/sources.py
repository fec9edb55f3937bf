"""Where source files come from: a directory or a zip, read the same way."""

from __future__ import annotations

import os
import unicodedata
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from mtl_dist.errors import UserError

_NOT_DATA = ("__MACOSX", "Thumbs.db", "desktop.ini")


class Readable(Protocol):
    """Bytes that are read when they are needed: a file, a page of one.

    Its `repr` changes when the file behind it does; its `str` names it in messages.
    """

    @property
    def size(self) -> int:
        """About how many bytes there are."""

    def read(self) -> bytes:
        """All of them.

        Raises:
            UserError: they cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Source:
    """The bytes of one file, read when they are needed; `stamp` changes when the file does."""

    path: str
    size: int
    stamp: int
    archive: str = ""

    def read(self) -> bytes:
        """The whole file.

        Raises:
            UserError: it cannot be read.
        """
        try:
            if self.archive:
                return _open_zip(self.archive, os.getpid()).read(self.path)
            return Path(self.path).read_bytes()
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise UserError(f"{self}: expected a readable file, found: {error}.") from None

    def __str__(self) -> str:
        return f"{self.archive}/{self.path}" if self.archive else self.path


@lru_cache(maxsize=4)
def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    """The archive, opened once per process: two processes that share an open file share its position."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a zip archive, found: {error}.") from None


class Tree:
    """The files below a directory or in a zip, by relative path with forward slashes.

    Hidden files and what operating systems leave behind (`.DS_Store`, `__MACOSX`) are not seen. Names are
    in Unicode's composed form, so that a name is the same whichever system wrote it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_archive = root.is_file()
        if self.is_archive and not zipfile.is_zipfile(root):
            raise UserError(f"{root}: expected a directory or a zip archive, found another kind of file.")
        if not root.exists():
            raise UserError(f"{root}: expected a directory or a zip archive, found nothing there.")

    def __str__(self) -> str:
        return str(self.root)

    @cached_property
    def _names(self) -> dict[str, str]:
        """The name on disk of each relative path; directories end in a slash."""
        names = _zip_names(self.root) if self.is_archive else _directory_names(self.root)
        return {
            unicodedata.normalize("NFC", name): name
            for name in names
            if not any(part.startswith(".") or part in _NOT_DATA for part in PurePosixPath(name).parts)
        }

    @cached_property
    def files(self) -> list[str]:
        """All files, sorted."""
        return sorted(name for name in self._names if not name.endswith("/"))

    @cached_property
    def directories(self) -> list[str]:
        """All directories, empty ones too, sorted, without a slash at the end."""
        found = {name.rstrip("/") for name in self._names if name.endswith("/")}
        for name in self.files:
            found.update(str(parent) for parent in PurePosixPath(name).parents)
        return sorted(found - {"."})

    def find(self, path: str) -> Source | None:
        """The file at a relative path (in a directory also an absolute one), or None."""
        if self.is_archive:
            name = self._names.get(unicodedata.normalize("NFC", str(PurePosixPath(path))))
            if name is None or name.endswith("/"):
                return None
            info = _open_zip(str(self.root), os.getpid()).getinfo(name)
            return Source(name, info.file_size, info.CRC, archive=str(self.root))
        full = self.root / path
        if not full.is_file() and "_names" in self.__dict__:  # listed: perhaps another Unicode form
            full = self.root / self._names.get(unicodedata.normalize("NFC", path), path)
        if not full.is_file():
            return None
        status = full.stat()
        return Source(str(full), status.st_size, status.st_mtime_ns)

    def source(self, path: str) -> Source:
        """The file at a path out of `files`."""
        found = self.find(path)
        assert found is not None, path
        return found


def _zip_names(root: Path) -> Iterable[str]:
    return [name for name in _open_zip(str(root), os.getpid()).namelist() if name.strip("/")]


def _directory_names(root: Path) -> Iterable[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: expected a readable directory, found: {error.strerror}.")

    visited = set()
    for directory, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:  # a link to a folder above: without this the walk never ends
            folders.clear()
            continue
        visited.add(real)
        relative = Path(directory).relative_to(root).as_posix()
        prefix = "" if relative == "." else relative + "/"
        yield from (f"{prefix}{folder}/" for folder in folders)
        yield from (f"{prefix}{file}" for file in files)
