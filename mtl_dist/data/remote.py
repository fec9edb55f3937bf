"""Where data lies: a path, or a URL of anything that fsspec reads (s3, gs, http, file, ...).

Every read of a URL is a request with a time limit; one that fails, stalls or ends early is made again, later
and later. An error that no repetition fixes (no such file, no permission) is raised at once. Credentials,
endpoints and proxies come from where the libraries look for them: the environment, AWS and Google profiles,
~/.netrc, ~/.config/fsspec.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import PlainSerializer, PlainValidator

from mtl_dist.errors import UserError
from mtl_dist.randomness import Draws, derive_key

log = logging.getLogger(__name__)

PART = 16 * 2**20  # bytes of one request
PIPE = "pipe:"
"""What the address of a stream begins with that is a command's output."""
_ATTEMPTS = 7
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 16.0  # seconds; doubled each time
_TIMEOUT = 60.0  # seconds for a part: a link slower than 270 kB/s cannot feed a training
_NO_USE_REPEATING = (400, 401, 403, 404, 405, 410)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
"""What botocore and google-auth, which need not be installed, raise where nobody is logged in."""

T = TypeVar("T")


class RangesIgnored(UserError):
    """The server sends whole files only."""


@dataclass(frozen=True)
class Url:
    """An address such as s3://bucket/folder/file."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Its last part."""
        return self.text.rstrip("/").rpartition("/")[2]

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on.

        Raises:
            UserError: they cannot be had.
        """

        def attempt() -> bytes:
            data = _request(self.text, start, start + size)
            if len(data) < size:
                raise OSError(f"{len(data)} bytes came instead of {size}")
            return data

        data = self._persist(attempt)
        if len(data) > size:
            raise RangesIgnored(
                f"{self}: expected the {size} bytes asked for, found {len(data)}: the server sends whole "
                "files only. Set `data.cache`, so that each is fetched once."
            )
        return data

    def read_all(self) -> bytes:
        """Everything.

        Raises:
            UserError: it cannot be had.
        """
        size = self.size()
        if size is None or size <= PART:
            return self._persist(lambda: _request(self.text, None, None))
        try:
            return b"".join(self.read(start, min(PART, size - start)) for start in range(0, size, PART))
        except RangesIgnored:
            return self._persist(lambda: _request(self.text, None, None))

    def size(self) -> int | None:
        """Its bytes, or None where the server does not say.

        Raises:
            UserError: there is no such file, or it cannot be had.
        """
        size: int | None = self._persist(lambda: _call(self.text, "info").get("size"))
        return size

    def matching(self, pattern: str) -> list[Url]:
        """The files below it that match a pattern such as *.tar, sorted.

        Raises:
            UserError: it cannot be listed.
        """
        names = self._persist(lambda: _call(self.text, "glob", f"/{pattern}"))
        scheme, _, _ = self.text.partition("://")
        return [Url(name if "://" in name else f"{scheme}://{name}") for name in sorted(names)]

    def _persist(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which is made again while that may help."""
        draws = Draws(derive_key(os.getpid(), time.monotonic_ns()))  # apart from every seeded generator
        wait = _FIRST_WAIT
        for number in range(1, _ATTEMPTS + 1):
            try:
                return attempt()
            except UserError:
                raise
            # Every storage has exceptions of its own, and no common base for them.
            except Exception as error:
                reason = f"{error}".strip() or type(error).__name__
                if _is_final(error) or number == _ATTEMPTS:
                    tries = f" after {number} attempts" if number > 1 else ""
                    raise UserError(f"{self}: expected to read it, found{tries}: {reason}.") from None
                log.warning("%s: %s; trying again in %.1f s", self, reason, wait)
                time.sleep(wait * draws.uniform(0.5, 1.0))  # or all ranks would come back at once
                wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("unreachable")


def read_together(ranges: Sequence[tuple[Url, int, int]]) -> list[bytes | None]:
    """The bytes of each (URL, start, size), asked for at once; None for those that did not come.

    Nothing is repeated here, and nothing raised: `Url.read` does both.
    """
    import fsspec.asyn

    answers: list[bytes | None] = [None] * len(ranges)
    by_system: dict[str, list[int]] = defaultdict(list)
    for number, (url, _, _) in enumerate(ranges):
        by_system[url.text.partition("://")[0]].append(number)
    for numbers in by_system.values():
        chosen = [ranges[number] for number in numbers]
        with suppress(UserError):
            system = _system(chosen[0][0].text)[0]
            if not isinstance(system, fsspec.asyn.AsyncFileSystem):
                continue
            paths = [system._strip_protocol(url.text) for url, _, _ in chosen]
            starts = [start for _, start, _ in chosen]
            ends = [start + size for _, start, size in chosen]
            work = system._cat_ranges
            with suppress(fsspec.asyn.FSTimeoutError):
                found = fsspec.asyn.sync(system.loop, work, paths, starts, ends, timeout=_TIMEOUT)
                for number, (_, _, size), data in zip(numbers, chosen, found, strict=True):
                    if isinstance(data, bytes) and len(data) == size:
                        answers[number] = data
    return answers


class UrlReader:
    """A URL read from its beginning to its end, a part at a time."""

    def __init__(self, url: Url) -> None:
        self._url = url
        self._size = url.size()
        if self._size is None:
            raise UserError(f"{url}: expected a server that states the size of a file, found none stated.")
        self._next = 0
        self._buffer = memoryview(b"")

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        assert self._size is not None
        pieces = []
        while size > 0:
            if not self._buffer:
                length = min(PART, self._size - self._next)
                if length == 0:
                    break
                self._buffer = memoryview(self._url.read(self._next, length))
                self._next += length
            pieces.append(bytes(self._buffer[:size]))
            self._buffer = self._buffer[size:]
            size -= len(pieces[-1])
        return b"".join(pieces)


def sha256_at(url: Url) -> str:
    """The SHA-256 of what is at a URL, in hexadecimal."""
    digest, reader = hashlib.sha256(), UrlReader(url)
    while data := reader.read(PART):
        digest.update(data)
    return digest.hexdigest()


Location = Path | Url
Place = TypeVar("Place", Path, Url, Path | Url)


def location(text: str | Path | Url) -> Location:
    """The URL or the path that a text is."""
    if isinstance(text, str):
        return Url(text) if "://" in text or text.startswith(PIPE) else Path(text)
    return text


def beside(directory: Location, name: str) -> Location:
    """What a manifest in `directory` calls `name`: a URL, an absolute path, or a path from there on."""
    if "://" in name or os.path.isabs(name):
        return location(name)
    return directory / name


def _validated(value: object) -> Location:
    if not isinstance(value, str | Path | Url):
        raise ValueError(f"expected a path or a URL, found {value!r}.")
    return location(value)


LocationSetting = Annotated[
    Path | Url,
    PlainValidator(_validated),
    PlainSerializer(str, return_type=str),
]
"""A setting that is a path or a URL."""


# ---------------------------------------------------------------- fsspec
def _request(url: str, start: int | None, stop: int | None) -> bytes:
    data: bytes = _call(url, "cat_file", start=start, end=stop)
    return data


def _call(url: str, method: str, suffix: str = "", **options: Any) -> Any:
    """A method of the URL's file system, with a time limit where that is possible."""
    import fsspec.asyn

    system, path = _system(url)
    if isinstance(system, fsspec.asyn.AsyncFileSystem):
        work = getattr(system, f"_{method}")
        return fsspec.asyn.sync(system.loop, work, path + suffix, timeout=_TIMEOUT, **options)
    return getattr(system, method)(path + suffix, **options)


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL's name there."""
    import fsspec.core

    try:
        # Made again each time: it is cached per process, and an instance does not outlive a fork.
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: expected a URL that can be read, found: {error}.") from None
    return system, path


def _is_final(error: Exception) -> bool:
    """Whether the same request would fail again for sure."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return True
    return getattr(error, "status", None) in _NO_USE_REPEATING or type(error).__name__ in _NO_CREDENTIALS
