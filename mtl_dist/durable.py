"""Files that are whole or absent (a temporary name, flush, fsync, rename), their hashes, and their locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Locked(Exception):
    """Another process holds the lock."""


@contextmanager
def replacing(path: Path, *, sync: bool = True, shared: bool = False) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` in one step when the block ends well.

    A reader sees the old file or the new one; a block that fails leaves the old one.

    Args:
        path: The file to replace; its directory is there.
        sync: Whether the file survives a power cut. It costs some milliseconds.
        shared: Whether several processes may replace it at once.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield temporary
        if sync:
            sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(path.parent)


def write_text(path: Path, text: str, *, sync: bool = True, shared: bool = False) -> None:
    """Replace `path` by `text` in one step, as `replacing` does."""
    with replacing(path, sync=sync, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable: a rename survives a power cut only after this."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def unwritable(directory: Path, error: OSError) -> str:
    """Why nothing can be written below a run folder, and what to do, in one line."""
    if not directory.is_dir():
        found = f"found none ({error.strerror}). It was renamed or deleted: bring it back"
        return f"{directory}: expected the run folder, {found}, and start the run again."
    advice = "Free some space" if error.errno in _FULL else "Make it writable"
    return (
        f"{directory}: expected to write to it, found: {error.strerror or error}. {advice}, and start the "
        "run again; the checkpoints in it are whole."
    )


def is_about(error: OSError, directory: Path) -> bool:
    """Whether an error is that something below `directory`, or the way to it, cannot be written.

    Of a write that fails because the disk is full, nobody knows the name.
    """
    if error.filename is None:
        return error.errno in _FULL or error.errno == errno.EROFS
    named, own = os.path.abspath(os.fsdecode(error.filename)), os.path.abspath(directory)
    return os.path.commonpath([named, own]) in (named, own)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold the lock of a file, which is made if it is not there, or of a directory; its descriptor.

    A lock ends with the process that holds it, however that ends.

    Raises:
        Locked: another process holds it, and `wait` is false.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(str(path)) from None
        yield descriptor
    finally:
        os.close(descriptor)
