"""Where source files come from: a directory or a zip, read the same way."""

from __future__ import annotations

import lzma
import os
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from mtl_dist.errors import UserError
from mtl_dist.importers.account import AGAIN, HIDDEN, LOOP, NO_FILE, Account

_UNPACKED, _MAX_RATIO = 64 * 1024**2, 200
"""A member of a zip may be of so many bytes, or of so many times those that it takes in it."""

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


def read_bytes(source: Readable | bytes) -> bytes:
    """The bytes of an image or a mask, which a record holds or points to."""
    return source if isinstance(source, bytes) else source.read()


@dataclass(frozen=True, slots=True)
class Source:
    """The bytes of one file, read when they are needed; `stamp` changes when the file does."""

    path: str
    size: int
    stamp: int
    archive: str = ""

    @staticmethod
    def at(path: Path) -> Source:
        """The file at a path.

        Raises:
            UserError: there is none.
        """
        if not path.is_file():
            raise UserError(f"{path}: expected a file, found none there.")
        status = path.stat()
        return Source(str(path), status.st_size, status.st_mtime_ns)

    def read(self) -> bytes:
        """The whole file.

        Raises:
            UserError: it cannot be read.
        """
        try:
            if self.archive:
                return self._unpacked()
            with open(self.path, "rb", buffering=0) as file:
                return file.readall()
        except UserError:
            raise  # a line of its own
        except (OSError, RuntimeError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{self}: expected a readable file, found: {error}.") from None
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{self}: expected a readable file, found: {error}.") from None

    def _unpacked(self) -> bytes:
        """The member of the archive. No more is unpacked than it says, and what it says is bounded."""
        archive = _open_zip(self.archive, os.getpid())
        member = archive.getinfo(self.path)
        if member.file_size > max(_UNPACKED, _MAX_RATIO * member.compress_size):
            raise UserError(
                f"{self}: expected at most {_MAX_RATIO} times its size in the archive, found "
                f"{member.file_size:,} bytes in {member.compress_size:,}. Unpack it yourself if you trust it."
            )
        return archive.read(member)

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

    Hidden files and what operating systems leave behind (`.DS_Store`, `__MACOSX`) are not among them, but
    counted (`left_out`). Names are in Unicode's composed form, so that a name is the same whichever system
    wrote it; of two that are then alike one keeps the form that it has. Links to folders are followed, but
    not to one that they are in.
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
    def _listing(self) -> tuple[dict[str, str], dict[str, str]]:
        """The name on disk of each relative path, directories with a slash at the end; what is left out."""
        listed = _zip_names(self.root) if self.is_archive else _directory_names(self.root)
        names: dict[str, str] = {}
        left_out: dict[str, str] = {}
        for name, fate in sorted(listed):
            path = name.replace("\\", "/") if self.is_archive else name  # some archives are made on Windows
            hidden = any(is_hidden(part) for part in PurePosixPath(path).parts)
            if hidden or fate:
                if fate or not path.endswith("/"):
                    left_out[name] = fate or HIDDEN
                continue
            composed = unicodedata.normalize("NFC", path)
            if composed == name and composed in names:  # the composed form has the first right to the name
                names[names[composed]] = names[composed]
            names[name if composed in names and composed != name else composed] = name
        return names, left_out

    @property
    def _names(self) -> dict[str, str]:
        return self._listing[0]

    @property
    def left_out(self) -> dict[str, str]:
        """The files and links that are not among `files`, and why."""
        return self._listing[1]

    def enter(self, account: Account) -> None:
        """Put all files into an account, with the fate of those that are left out."""
        account.found("files", (*self.files, *self.left_out))
        for name, fate in self.left_out.items():
            account.became("files", name, fate)

    @cached_property
    def files(self) -> list[str]:
        """All files, sorted."""
        return sorted(name for name in self._names if not name.endswith("/"))

    @cached_property
    def directories(self) -> list[str]:
        """All directories, empty ones too, sorted, without a slash at the end."""
        found = {name.rstrip("/") for name in self._names if name.endswith("/")}
        for folder in {name[: name.rfind("/") + 1] for name in self.files}:
            path = PurePosixPath(folder)
            found.update(map(str, (path, *path.parents)))
        return sorted(found - {"."})

    def find(self, path: str) -> Source | None:
        """The file at a relative path (in a directory also an absolute one), or None."""
        if self.is_archive:
            plain = str(PurePosixPath(path))
            name = self._names.get(plain) or self._names.get(unicodedata.normalize("NFC", plain))
            if name is None or name.endswith("/"):
                return None
            info = _open_zip(str(self.root), os.getpid()).getinfo(name)
            return Source(name, info.file_size, info.CRC, archive=str(self.root))
        if "_listing" in self.__dict__:  # perhaps in another Unicode form
            path = self._names.get(path) or self._names.get(unicodedata.normalize("NFC", path)) or path
        full = self.root / path
        if not full.is_file():
            return None
        status = full.stat()
        return Source(str(full), status.st_size, status.st_mtime_ns)

    def written(self, path: str) -> str:
        """The name of a file out of `files` as it is written where it lies, in whichever Unicode form."""
        name = self._names[path]
        return name.replace("\\", "/") if self.is_archive else name

    def relative(self, path: str) -> str:
        """The path of a source's file from the root of the tree on."""
        return path if self.is_archive else os.path.relpath(path, self.root)

    def inside(self, source: Source) -> str:
        """The path of a file of the tree, as `files` has it."""
        path = self.relative(source.path)
        return path if path in self._names else unicodedata.normalize("NFC", path)

    def source(self, path: str) -> Source:
        """The file at a path out of `files`."""
        found = self.find(path)
        assert found is not None, path
        return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data by its name: hidden, or left behind by an operating system."""
    return name.startswith(".") or name in _NOT_DATA


def _zip_names(root: Path) -> Iterator[tuple[str, str]]:
    """(name, why it is left out or nothing) of each member; of two of one name the last is read."""
    names = [name for name in _open_zip(str(root), os.getpid()).namelist() if name.strip("/\\")]
    for name, count in Counter(names).items():
        yield name, ""
        yield from ((f"{name} ({number} of {count})", AGAIN) for number in range(1, count) if name[-1] != "/")


def _directory_names(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, why it is left out or nothing) of everything below a directory."""

    def inside(folder: Path, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder}: expected a readable directory, found: {error.strerror}.") from None
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real in above:  # without this the walk never ends
                    yield name, LOOP
                    continue
                yield f"{name}/", ""
                yield from inside(Path(entry.path), f"{name}/", above | {real})
            else:
                yield name, "" if entry.is_file() else NO_FILE

    yield from inside(root, "", frozenset((os.path.realpath(root),)))
