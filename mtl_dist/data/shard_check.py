"""Local shards compared with their hashes in the background, once for each machine and file.

    with ShardCheck(shards, 0, say) as check:
        for batch in check.watched(batches):    a shard of another content ends the run here
            ...
        check.finish()

A thread of the lowest priority reads them, for a fifth of its time: it takes a fifth of what the disk gives,
and of one core. What it has found good is kept in the user's state folder by size, time and inode; there
nobody looks again until the file is another. Shards that are fetched are compared when they come (cache.py).
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from mtl_dist.config.trust import state_folder
from mtl_dist.data.loader import Source
from mtl_dist.data.remote import beside
from mtl_dist.errors import UserError

T = TypeVar("T")

_PART = 1 << 22  # bytes between two pauses
_REST = 4.0  # how many times as long as it has read the thread rests
_MAX_KEPT = 1 << 24  # bytes of one record of what was found good
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class LocalShard:
    """A shard on this machine, and what its manifest says of it."""

    path: Path
    num_bytes: int
    sha256: str


def local_shards(sources: Iterable[Source]) -> list[LocalShard]:
    """The shards of some sources that are files, each once."""
    found = {}
    for source in sources:
        for shard in source.facts.info.shards:
            path = beside(source.facts.path, shard.path)
            if isinstance(path, Path):
                found[path] = LocalShard(path, shard.num_bytes, shard.sha256)
    return list(found.values())


class ShardCheck:
    """The check of some shards, while the block runs.

    Args:
        shards: In the order in which they are read.
        begin_at: The share of them that is passed over at first: machines that read the same disk begin at
            different places, and find what the others have found.
        say: Is told how many shards were not reached, and of a mismatch where it does not end the run.
        ends: Whether a mismatch ends the run.
    """

    def __init__(
        self, shards: Sequence[LocalShard], begin_at: float, say: Callable[[str], None], *, ends: bool = True
    ) -> None:
        first = int(len(shards) * begin_at)
        self.shards = [*shards[first:], *shards[:first]]
        self.num_checked = 0
        self._say = say
        self._ends = ends
        self._known = _Known()
        self._problems: list[str] = []
        self._over = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._check, name="shard-check", daemon=True)

    def __enter__(self) -> ShardCheck:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._hurry.set()
        self._thread.join(_PATIENCE_S)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """The items, as long as no shard of another content was found.

        Raises:
            UserError: one was, with its name.
        """
        for item in items:
            self._raise()
            yield item

    def finish(self) -> None:
        """Wait a few seconds for what is left, and tell of what was not reached.

        Raises:
            UserError: a shard has another content.
        """
        self._hurry.set()
        self._thread.join(_PATIENCE_S)
        self._raise()
        left = len(self.shards) - self.num_checked
        if left:
            self._say(
                f"shards   {left:,} of {len(self.shards):,} were not yet compared with their hashes; the "
                f"next run goes on, and `mtl inspect --verify {self.shards[-1].path.parent}` compares all."
            )

    def _raise(self) -> None:
        while self._problems:
            line = self._problems.pop(0)
            if self._ends:
                raise UserError(line)
            self._say(f"warning  {line}")

    # ------------------------------------------------------------------ the thread
    def _check(self) -> None:
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for shard in self.shards:
            if self._over.is_set():
                return
            problem = self.problem_of(shard)
            if problem:
                self._problems.append(problem)
            self.num_checked += not self._over.is_set()

    def problem_of(self, shard: LocalShard) -> str:
        """What is wrong with a shard; nothing where it is gone: reading it says so, if it is needed."""
        try:
            descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            facts = _facts(descriptor)
            if self._known.of(shard.path) == (shard.sha256, facts):
                return ""
            found = self.hash_of(descriptor)
            if found is None or _facts(descriptor) != facts:
                return ""  # the run is over; or it is being written, and no hash says anything
        except OSError as error:
            return f"{shard.path}: expected to read it, found: {error.strerror}. Copy it again."
        finally:
            os.close(descriptor)
        if found == shard.sha256:
            _keep(shard.path, found, facts)
            return ""
        return (
            f"{shard.path}: expected the content that was prepared (SHA-256 {shard.sha256[:12]}...), found "
            f"another ({found[:12]}...): damaged, or changed since. Copy it again, or prepare the dataset "
            "again."
        )

    def hash_of(self, descriptor: int) -> str | None:
        """The SHA-256 of an open file; None where the run is over before."""
        digest, offset = hashlib.sha256(), 0
        while not self._over.is_set():
            began = time.monotonic()
            part = os.pread(descriptor, _PART, offset)
            if not part:
                return digest.hexdigest()
            digest.update(part)
            offset += len(part)
            self._hurry.wait(_REST * (time.monotonic() - began))
        return None


# ---------------------------------------------------------------- what was found good before
Facts = tuple[int, int, int]
"""Size, time of the last change in ns, inode."""


def _facts(descriptor: int) -> Facts:
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def record_of(path: Path) -> Path:
    """The record of the shards in the folder of `path`."""
    folder = hashlib.sha256(os.fsencode(path.parent.absolute())).hexdigest()
    return state_folder() / "shards" / f"{folder[:32]}.txt"


class _Known:
    """What was found good; a record is read again where another process has added to it."""

    def __init__(self) -> None:
        self._records: dict[Path, tuple[tuple[int, int], dict[str, tuple[str, Facts]]]] = {}

    def of(self, path: Path) -> tuple[str, Facts] | None:
        """The hash and facts with which the file at `path` was good."""
        try:
            record = record_of(path)
            stat = record.stat()
            version = stat.st_mtime_ns, stat.st_size
            if record not in self._records or self._records[record][0] != version:
                self._records[record] = version, _read(record)
        except (OSError, ValueError, RuntimeError):
            return None
        return self._records[record][1].get(path.name)


def _read(record: Path) -> dict[str, tuple[str, Facts]]:
    """By the name of a file its hash and facts; a damaged line says nothing."""
    found = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        sha256, *numbers, name = [*line.split(" ", 4), ""][:5]
        with suppress(ValueError):
            size, mtime, inode = map(int, numbers)
            found[name] = sha256, (size, mtime, inode)
    return found


def _keep(path: Path, sha256: str, facts: Facts) -> None:
    """Without a state folder that can be written nothing is kept, and it is hashed again the next time."""
    with suppress(OSError, ValueError, RuntimeError):
        record = record_of(path)
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if record.is_file() and record.stat().st_size > _MAX_KEPT:
            record.unlink()
        with open(record, "a", encoding="utf-8") as file:
            file.write(f"{sha256} {' '.join(map(str, facts))} {path.name}\n")
