"""One pass over a WebDataset tar that someone else wrote: where its images are, and what its labels say.

The tar is read once, from its beginning to its end, hashed on the way; nothing is written. What counts as a
sample is WebDataset's rule: members that follow one another and whose names are the same up to the first
dot of the file name ("a/b.1/0001.left.jpg": key "a/b.1/0001", extension "left.jpg").
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np

from mtl_dist.data.content_hashes import content_hash
from mtl_dist.data.images import IMAGE_EXTENSIONS, UnreadableImage, examine_image, open_map
from mtl_dist.data.manifest import ShardInfo
from mtl_dist.data.remote import Location, Url, UrlReader
from mtl_dist.data.shards import index_dtype
from mtl_dist.errors import UserError
from mtl_dist.importers.sources import is_hidden
from mtl_dist.kinds.kind import UnreadableMap
from mtl_dist.kinds.registry import map_kind
from mtl_dist.kinds.vocabulary import Cell, LabelError
from mtl_dist.specs import TaskInfo

_NAME = re.compile(r"^((?:.*/)?[^.]+)\.([^/]*)$")
_CHUNK = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass(frozen=True)
class LabelField:
    """Where a label stands in a sample: the member with an extension, or a value inside its JSON.

    Written `cls`, `txt`, `json:age` or `meta.json:person.age`.
    """

    extension: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.extension, ".".join(self.path))) if self.path else self.extension

    @staticmethod
    def parse(text: str) -> LabelField:
        """The field of a text; extensions are compared in lower case, as WebDataset does."""
        extension, _, path = text.partition(":")
        return LabelField(extension.lower().lstrip("."), tuple(path.split(".")) if path else ())

    def cell(self, members: Mapping[str, bytes]) -> Cell:
        """The value in a sample as text, "" where it has none; a list where JSON has one.

        Raises:
            ValueError: the member is no text, no JSON, or its value is an object.
        """
        data = members.get(self.extension)
        if data is None:
            return ""
        if not self.path and not self.extension.endswith("json"):
            return data.decode("utf-8-sig").strip()
        value = json.loads(data, parse_float=str, parse_constant=str)
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, list):
            return [_text(item) for item in value]
        return _text(value)


@dataclass(frozen=True)
class TarScan:
    """What to look for in a tar.

    `images` are the extensions that may be the image; `labels` and `masks` the field of each task, and
    `task_infos` what is known of it, and `values` the class of each value of a mask, where it is stated.
    With `verify` every image is decoded.
    """

    path: Location
    images: tuple[str, ...]
    labels: Mapping[str, LabelField]
    masks: Mapping[str, str]
    task_infos: Mapping[str, TaskInfo]
    verify: bool
    values: Mapping[str, Mapping[int, int]] = field(default_factory=dict)


@dataclass
class TarFacts:
    """What a scan found: the shard, offsets and sizes of images and masks, and the labels as text.

    `rows` are index rows whose `labelled` is still 0. `tallies` is what is counted of each task's maps.
    `skipped` are the samples left out, and why; `hidden` the members that are no data. `content_hashes`
    are those of the images, in a row.
    """

    info: ShardInfo
    rows: np.ndarray
    keys: list[str]
    cells: dict[str, list[Cell]]
    tallies: dict[str, np.ndarray]
    image_kinds: dict[str, tuple[str, int]] = field(default_factory=dict)
    oddities: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    content_hashes: bytes = b""


@dataclass(frozen=True)
class _Member:
    offset: int
    data: bytes


class _Skipped(Exception):
    """A sample that cannot be used; the message says why."""


def scan_tar(scan: TarScan, tick: Callable[[], None]) -> TarFacts:
    """Read the tar of `scan`, then call `tick`.

    Raises:
        UserError: no whole, uncompressed tar, or a sample that does not fit what was asked for.
    """
    dtype = index_dtype(tuple(scan.masks))
    facts = TarFacts(
        ShardInfo(str(scan.path), 0, 0, ""),
        np.empty(0, dtype),
        [],
        {task: [] for task in scan.labels},
        {task: map_kind(scan.task_infos[task].kind).tally(scan.task_infos[task]) for task in scan.masks},
    )
    rows: list[tuple[int, ...]] = []
    hashes: list[bytes] = []
    oddities: Counter[str] = Counter()
    with _opened_file(scan.path) as file:
        stream = _HashingReader(file)
        for key, members in _samples(scan, stream, facts):
            where = f"{scan.path}, sample {key}"
            try:
                rows.append(_row(scan, key, members, facts, oddities, hashes))
            except _Skipped as reason:
                facts.skipped.append(f"{where}: {reason}.")
                continue
            facts.keys.append(key)
            contents = {extension: member.data for extension, member in members.items()}
            for task, label in scan.labels.items():
                try:
                    facts.cells[task].append(label.cell(contents))
                except ValueError as error:
                    raise UserError(
                        f"{where}: task {task!r}: expected a label in {label}: {error}."
                    ) from None
        stream.drain()
    facts.rows = np.array(rows, dtype)
    facts.oddities = dict(oddities)
    facts.content_hashes = b"".join(hashes)
    facts.info = ShardInfo(str(scan.path), len(rows), stream.num_bytes, stream.hash.hexdigest())
    tick()
    return facts


def _row(
    scan: TarScan,
    key: str,
    members: Mapping[str, _Member],
    facts: TarFacts,
    oddities: Counter[str],
    hashes: list[bytes],
) -> tuple[int, ...]:
    """A sample's row in the index; what its image and its masks are is added to `facts`."""
    where = f"{scan.path}, sample {key}"
    found = [extension for extension in scan.images if extension in members]
    if len(found) > 1:
        raise UserError(f"{where}: expected one image, found {', '.join(found)}. Choose one with --image.")
    if not found:
        there = ", ".join(f".{extension}" for extension in sorted(members))
        raise _Skipped(f"expected an image (--image {','.join(scan.images)}), found {there}")
    image = members[found[0]]
    try:
        picture = examine_image(image.data, decode=scan.verify)
    except UnreadableImage as error:
        raise _Skipped(f"expected a readable image, found {error}") from None
    row = [image.offset, len(image.data), 0, 0, 0]
    for task, extension in scan.masks.items():
        info = scan.task_infos[task]
        kind = map_kind(info.kind)
        member = members.get(extension)
        if member is None:
            row += [0, 0]
            continue
        try:
            with open_map(member.data) as opened:
                mask = kind.store(member.data, opened, info, scan.values.get(task, {}))
        except (UnreadableMap, UnreadableImage) as error:
            raise UserError(f"{where}: task {task!r}: {error}.") from None
        except LabelError as error:
            raise UserError(f"{where}: task {task!r}: {error}") from None
        if (mask.width, mask.height) != (picture.width, picture.height):
            raise UserError(
                f"{where}: task {task!r}: expected the size of its image, {picture.width}x{picture.height}, "
                f"found {mask.width}x{mask.height}."
            )
        if mask.data is not member.data:
            raise UserError(
                f"{where}: task {task!r}: expected an 8-bit grey PNG of class indices, found another kind of "
                "mask. Tars are not rewritten here: unpack them and use `mtl prepare table`."
            )
        facts.tallies[task] = kind.add(facts.tallies[task], mask.tally)
        row += [member.offset, len(member.data)]
    image_kind = f"{picture.channels} {picture.dtype}"
    example, number = facts.image_kinds.get(image_kind, (where, 0))
    facts.image_kinds[image_kind] = (example, number + 1)
    oddities.update(picture.oddities)
    hashes.append(content_hash(image.data))
    return tuple(row)


def _samples(
    scan: TarScan, stream: _HashingReader, facts: TarFacts
) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, members by extension) of each sample; only the members that are asked for are kept.

    What an operating system left behind (`._0001.jpg`) is no member of a sample, but counted in `facts`.
    """
    wanted = {*scan.images, *scan.masks.values(), *(label.extension for label in scan.labels.values())}
    last, members = "", dict[str, _Member]()
    with _opened(scan.path, stream) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # (it keeps every header otherwise)
            parts = _NAME.match(member.name.removeprefix("./"))
            if not member.isfile() or parts is None:
                continue
            if any(map(is_hidden, PurePosixPath(parts[0]).parts)):
                facts.hidden.append(member.name)
                continue
            key, extension = parts[1], parts[2].lower()
            if key != last:
                if members:
                    yield last, members
                last, members = key, {}
            if extension in members:
                raise UserError(f"{scan.path}, sample {key}: expected one member .{extension}, found two.")
            content = tar.extractfile(member) if extension in wanted else None
            members[extension] = _Member(member.offset_data, content.read() if content else b"")
    if members:
        yield last, members


@contextmanager
def _opened_file(path: Location) -> Iterator[_Readable]:
    if isinstance(path, Url):
        yield UrlReader(path)
        return
    with open(path, "rb") as file:
        yield file


@contextmanager
def _opened(path: Location, stream: _HashingReader) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=1) as tar:  # type: ignore[call-overload]
            yield tar
    except tarfile.TarError as error:
        kind = next((name for head, name in _COMPRESSED.items() if stream.head.startswith(head)), None)
        if kind is not None:
            raise UserError(
                f"{path}: expected an uncompressed tar, in which a sample can be found by its offset, found "
                f"one compressed by {kind}. Decompress it."
            ) from None
        raise UserError(f"{path}: expected a whole tar, found: {error}.") from None


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _HashingReader:
    """A file that is read once, hashed on the way."""

    def __init__(self, file: _Readable) -> None:
        self.hash = hashlib.sha256()
        self.num_bytes = 0
        self.head = b""
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        self.num_bytes += len(data)
        self.head = self.head or data[:8]
        return data

    def drain(self) -> None:
        """Read what follows the end of the archive."""
        while self.read(_CHUNK):
            pass


def image_extensions(text: str | None) -> tuple[str, ...]:
    """The extensions of an image that a text such as "jpg,png" names; all usual ones without it."""
    if text is None:
        return tuple(sorted(IMAGE_EXTENSIONS))
    return tuple(part.strip().lower().lstrip(".") for part in text.split(","))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict | list):
        raise ValueError(f"found {type(value).__name__} where one value is expected")
    return value.strip() if isinstance(value, str) else json.dumps(value)
