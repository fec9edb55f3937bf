"""Images that an importer gives as bytes, kept in one file until they are packed, none in memory."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mtl_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Spooled:
    """Bytes in a spool. By its `repr` an interrupted preparation knows them again, wherever they lie."""

    name: str
    size: int
    digest: str
    path: str = field(repr=False)
    offset: int = field(repr=False)

    def read(self) -> bytes:
        """All of them.

        Raises:
            UserError: the spool was cut off or removed.
        """
        try:
            spool = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(spool, self.size, self.offset)
            finally:
                os.close(spool)
        except OSError as error:
            raise UserError(f"{self.path}: expected a readable file, found: {error.strerror}.") from None
        if len(data) != self.size:
            raise UserError(f"{self.path}: expected {self.size} bytes at {self.offset}, found {len(data)}.")
        return data

    def __str__(self) -> str:
        return self.name


class Spool:
    """A file to which bytes are appended; made when the first come, removed by `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._size = 0

    def add(self, data: bytes, name: str) -> Spooled:
        """Append bytes that messages call `name`.

        Raises:
            OSError: they cannot be written.
        """
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115 (closed by `close`)
        self._file.write(data)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        spooled = Spooled(name, len(data), digest, str(self._path), self._size)
        self._size += len(data)
        return spooled

    def flush(self) -> None:
        """Make what was added readable for other processes."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
