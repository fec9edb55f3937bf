"""A cache of remote files on the node's own disk, shared by all processes and runs there.

    <dir>/<key>            a whole file; its modification time is when it was last opened
    <dir>/<key>.partial    one being fetched, locked by the process that does it
    <dir>/lock             held while room is made

A file is fetched under its partial name, checked against size and hash, and renamed: what has its final name
is whole. Whoever finds a file being fetched waits for it. When room is needed the files that were not opened
for longest are removed; a process that has one open reads on, its blocks are freed when it closes. A partial
file whose lock is free was left by a process that died, and is removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mtl_dist.config.settings import Settings
from mtl_dist.data.remote import PART, RangesIgnored, Url
from mtl_dist.durable import Locked, locked
from mtl_dist.errors import UserError

_PARTIAL = ".partial"
_LOCK = "lock"
_LOOK_AGAIN = 0.1  # seconds


class CacheSettings(Settings):
    """Remote files are kept on the node's own disk."""

    dir: Path
    """A directory on a local disk; runs that share it share its files."""
    max_gb: Annotated[float, Field(gt=0)] = 100.0
    """The most it may hold, in 10^9 bytes."""

    @property
    def max_bytes(self) -> int:
        """The same in bytes."""
        return int(self.max_gb * 1e9)


class Cache:
    """The cache in a directory.

    Raises:
        UserError: the directory cannot be made or written.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._directory = settings.dir.absolute()
        self._max_bytes = settings.max_bytes
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def open(self, url: Url, size: int | None = None, sha256: str = "", version: str = "") -> int:
        """A descriptor of the file at `url`, which is fetched if it is not here.

        `size` and `sha256` are what it must have, where that is known; `version` separates one content from
        another where no hash does.

        Raises:
            UserError: it cannot be had, it is another file than was said, or the cache is too small for it.
        """
        path = self._directory / hashlib.sha256(f"{url}\0{size}\0{sha256}\0{version}".encode()).hexdigest()
        try:
            while True:
                if (descriptor := _opened(path, size)) is not None:
                    return descriptor
                with self._fetching(path) as partial:
                    if partial is None:
                        continue
                    # Fetched by another process between our look and our lock.
                    if (descriptor := _opened(path, size)) is not None:
                        os.unlink(f"{path}{_PARTIAL}")
                        return descriptor
                    self._fetch(url, size, sha256, partial)
                    os.rename(f"{path}{_PARTIAL}", path)
        except OSError as error:
            raise self._unusable(error) from None

    @contextmanager
    def _fetching(self, path: Path) -> Iterator[int | None]:
        """The descriptor of the locked partial file, or None where another process has just fetched it."""
        name = f"{path}{_PARTIAL}"
        with locked(Path(name)) as descriptor:
            yield descriptor if _is_file_at(descriptor, name) else None

    def _fetch(self, url: Url, size: int | None, sha256: str, partial: int) -> None:
        if size is None:
            data = url.read_all()
            self._make_room(partial, len(data))
            parts: Iterator[bytes] = iter((data,))
            size = len(data)
        else:
            self._make_room(partial, size)
            parts = _parts(url, size)
        digest, offset = hashlib.sha256(), 0
        for part in parts:
            digest.update(part)
            offset += _write(partial, part, offset)
        if offset != size or (sha256 and digest.hexdigest() != sha256):
            os.ftruncate(partial, 0)
            raise UserError(
                f"{url}: expected the {size:,} bytes in the manifest, found {offset:,} of another content. "
                "Copy it again, or prepare the dataset again."
            )
        os.fsync(partial)

    def _make_room(self, partial: int, size: int) -> None:
        """Reserve `size` bytes for a partial file, at the cost of files not used for longest."""
        if size > self._max_bytes:
            raise UserError(
                f"data.cache.max_gb: expected room for a file of {size:,} bytes, found {self._max_bytes:,} "
                "bytes at most. Allow more."
            )
        os.ftruncate(partial, 0)  # what a process that died had written
        while not self._reserved(partial, size):
            # The room is taken by files that others fetch, and will be theirs to lose.
            time.sleep(_LOOK_AGAIN)

    def _reserved(self, partial: int, size: int) -> bool:
        """Whether there was room, or could be made, for `size` bytes."""
        with locked(self._directory / _LOCK):
            whole, occupied = self._content()
            for _, length, path in sorted(whole):
                if occupied + size <= self._max_bytes:
                    break
                path.unlink(missing_ok=True)
                occupied -= length
            if occupied + size > self._max_bytes:
                return False
            if size:
                os.posix_fallocate(partial, 0, size)
            return True

    def _content(self) -> tuple[list[tuple[int, int, Path]], int]:
        """(last opened, size, path) of each whole file, and the bytes of these and of files being fetched."""
        whole, occupied = [], 0
        for entry in os.scandir(self._directory):
            path = Path(entry.path)
            with suppress(FileNotFoundError):
                status = entry.stat()
                if path.suffix == _PARTIAL:
                    occupied += 0 if _remove_if_abandoned(path) else status.st_size
                elif entry.name != _LOCK:
                    whole.append((status.st_mtime_ns, status.st_size, path))
                    occupied += status.st_size
        return whole, occupied

    def _unusable(self, error: OSError) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        return UserError(
            f"data.cache.dir: expected {self._directory} to be a directory with room, found: {reason}."
        )


def _opened(path: Path, size: int | None) -> int | None:
    """A descriptor of a whole file, or None where there is none: not fetched, or cut off by a crash since."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if size not in (None, os.fstat(descriptor).st_size):
        os.close(descriptor)
        return None
    with suppress(PermissionError):  # fetched by another user
        os.utime(descriptor)
    return descriptor


def _parts(url: Url, size: int) -> Iterator[bytes]:
    """The file a part at a time, or whole from a server that sends nothing else."""
    for start in range(0, size, PART):
        try:
            part = url.read(start, min(PART, size - start))
        except RangesIgnored:
            yield url.read_all()[start:]
            return
        yield part


def _write(descriptor: int, data: bytes, offset: int) -> int:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count
    return len(data)


def _is_file_at(descriptor: int, path: str) -> bool:
    """Whether the open file still has this name: another process may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(partial: Path) -> bool:
    """Remove a partial file whose lock nobody holds; whether that was so."""
    try:
        with locked(partial, wait=False):
            partial.unlink()  # under the lock, or it might be somebody's by now
            return True
    except Locked:
        return False
