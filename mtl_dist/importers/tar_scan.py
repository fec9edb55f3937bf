"""One pass over a WebDataset tar that someone else wrote: where its images are, and what its labels say.

The tar is read once, from its beginning to its end, hashed on the way; nothing is written. What counts as a
sample is WebDataset's rule: members that follow one another and whose names are the same up to the first
dot of the file name ("a/b.1/0001.left.jpg": key "a/b.1/0001", extension "left.jpg").
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np

from mtl_dist.data.content_hashes import content_hash
from mtl_dist.data.external import LabelField
from mtl_dist.data.images import ImageFacts, UnreadableImage, examine_image, open_map
from mtl_dist.data.manifest import ShardInfo
from mtl_dist.data.remote import Location, Url, UrlReader
from mtl_dist.data.shards import index_dtype
from mtl_dist.errors import UserError
from mtl_dist.importers.account import HIDDEN, IMAGE, MASK
from mtl_dist.importers.orientation import DISPLAYED, check_size
from mtl_dist.importers.sources import is_hidden
from mtl_dist.kinds.kind import StoredMap, UnreadableMap
from mtl_dist.kinds.registry import map_kind
from mtl_dist.kinds.vocabulary import Cell, LabelError
from mtl_dist.specs import TaskInfo

_LABEL, _NOT_ASKED = "label", "left out: no task is made of it"
_NO_SAMPLE = "left out: of a sample without an image that can be used"
_FOLDER, _NO_EXTENSION = "folder", "left out: a name without an extension"
_NO_FILE = "left out: a link or no file"

_NAME = re.compile(r"^((?:.*/)?[^.]+)\.([^/]*)$")
_CHUNK = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass(frozen=True)
class TarScan:
    """What to look for in a tar.

    `images` are the extensions that may be the image; `labels` and `masks` the field of each task, and
    `task_infos` what is known of it, and `values` the class of each value of a mask, where it is stated.
    `columns` are more fields, by which samples are split. With `verify` every image is decoded.
    """

    path: Location
    images: tuple[str, ...]
    labels: Mapping[str, LabelField]
    masks: Mapping[str, str]
    task_infos: Mapping[str, TaskInfo]
    verify: bool
    values: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    columns: Mapping[str, LabelField] = field(default_factory=dict)
    places: frozenset[str] = frozenset()
    """The tasks whose labels have a place in their image, and may be lists of lists."""


@dataclass
class TarFacts:
    """What a scan found: the shard, offsets and sizes of images and maps, and the labels as text.

    `rows` are index rows whose `labelled` is still 0; `cells` and `columns` are the texts of labels and of
    other fields, row by row, and `tallies` what is counted of each map (None without one). `members` counts
    what became of each member, `conventions` has an example of each way in which maps were read, and
    `unlabelled` the maps that say nothing. `skipped` are the samples left out, and why. `content_hashes` are
    those of the images, in a row, and `pictures` what each is, where labels have a place in it.
    """

    info: ShardInfo
    rows: np.ndarray
    keys: list[str]
    cells: dict[str, list[Cell]]
    columns: dict[str, list[Cell]]
    tallies: dict[str, list[np.ndarray | None]]
    conventions: dict[str, dict[str, str]]
    members: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)
    image_kinds: dict[str, tuple[str, int]] = field(default_factory=dict)
    oddities: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    content_hashes: bytes = b""
    pictures: list[ImageFacts] = field(default_factory=list)


@dataclass(frozen=True)
class _Member:
    offset: int
    data: bytes
    in_one_place: bool = True


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
        {name: [] for name in scan.columns},
        {task: [] for task in scan.masks},
        {task: {} for task in scan.masks},
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
                facts.members[_NO_SAMPLE] += len(members)
                continue
            facts.keys.append(key)
            contents = {extension: member.data for extension, member in members.items()}
            for fields, found in ((scan.labels, facts.cells), (scan.columns, facts.columns)):
                for name, label in fields.items():
                    try:
                        found[name].append(label.cell(contents, nested=name in scan.places))
                    except ValueError as error:
                        raise UserError(f"{where}: {name!r}: expected a label in {label}: {error}.") from None
            for extension in members:
                facts.members[_fate(scan, extension)] += 1
        stream.drain(scan.path)
    facts.rows = np.array(rows, dtype)
    facts.oddities = dict(oddities)
    facts.content_hashes = b"".join(hashes)
    facts.info = ShardInfo(str(scan.path), len(rows), stream.num_bytes, stream.hash.hexdigest())
    tick()
    return facts


def _fate(scan: TarScan, extension: str) -> str:
    """What became of a member of a sample that is used."""
    if extension in scan.images:
        return IMAGE
    if extension in scan.masks.values():
        return MASK
    asked = {label.extension for label in (*scan.labels.values(), *scan.columns.values())}
    return _LABEL if extension in asked else _NOT_ASKED


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
    if not image.in_one_place:
        raise _Skipped(f"expected the image .{found[0]} in one piece, found a sparse member")
    try:
        picture = examine_image(image.data, decode=scan.verify)
    except UnreadableImage as error:
        raise _Skipped(f"expected a readable image, found {error}") from None
    row = [image.offset, len(image.data), 0, 0, 0]
    for task, extension in scan.masks.items():
        member = members.get(extension)
        stored = None if member is None else _map(scan, task, where, member, picture)
        if stored is None or member is None or not map_kind(scan.task_infos[task].kind).is_labelled(stored):
            facts.unlabelled[task] += stored is not None
            facts.tallies[task].append(None)
            row += [0, 0]
            continue
        facts.tallies[task].append(stored.tally)
        facts.conventions[task].setdefault(stored.convention, where)
        row += [member.offset, len(member.data)]
    image_kind = f"{picture.channels} {picture.dtype}"
    example, number = facts.image_kinds.get(image_kind, (where, 0))
    facts.image_kinds[image_kind] = (example, number + 1)
    oddities.update(picture.oddities)
    facts.pictures += [picture] if scan.places else []
    hashes.append(content_hash(image.data))
    return tuple(row)


def _map(scan: TarScan, task: str, where: str, member: _Member, picture: ImageFacts) -> StoredMap:
    """The map of a task in a sample.

    Raises:
        UserError: it does not fit the task or its image, or would have to be stored in another form.
    """
    info = scan.task_infos[task]
    try:
        with open_map(member.data) as opened:
            stored = map_kind(info.kind).store(member.data, opened, info, scan.values.get(task, {}))
    except (UnreadableMap, UnreadableImage) as error:
        raise UserError(f"{where}: task {task!r}: {error}.") from None
    except LabelError as error:
        raise UserError(f"{where}: task {task!r}: {error}") from None
    check_size(f"{where}: task {task!r}", stored, picture, DISPLAYED)
    if not member.in_one_place:
        raise UserError(f"{where}: task {task!r}: expected a file in one piece, found a sparse member.")
    if stored.data is not member.data and not scan.values.get(task):
        names = f"--classes {task}={','.join(f'VALUE:{name}' for name in info.classes)}"
        advice = f"name the classes by their values ({names}), or " if info.classes else ""
        raise UserError(
            f"{where}: task {task!r}: expected a file as shards hold it (of classes an 8-bit grey PNG of "
            f"class indices), found another form. Tars are not rewritten here: {advice}unpack them and use "
            "`mtl prepare table`."
        )
    return stored


def _samples(
    scan: TarScan, stream: _HashingReader, facts: TarFacts
) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, members by extension) of each sample; only the members that are asked for are kept.

    What an operating system left behind (`._0001.jpg`) is no member of a sample, but counted in `facts`.
    """
    asked = (*scan.labels.values(), *scan.columns.values())
    wanted = {*scan.images, *scan.masks.values(), *(label.extension for label in asked)}
    last, members = "", dict[str, _Member]()
    with _opened(scan.path, stream) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # (it keeps every header otherwise)
            name = _printable(member.name.removeprefix("./"))
            parts = _NAME.match(name)
            if not member.isfile():
                facts.members[_FOLDER if member.isdir() else _NO_FILE] += 1
                continue
            if any(map(is_hidden, PurePosixPath(name).parts)):
                facts.hidden.append(name)
                facts.members[HIDDEN] += 1
                continue
            if parts is None:
                facts.members[_NO_EXTENSION] += 1
                continue
            key, extension = parts[1], parts[2].lower()
            if key != last:
                if members:
                    yield last, members
                last, members = key, {}
            if extension in members:
                raise UserError(f"{scan.path}, sample {key}: expected one member .{extension}, found two.")
            content = tar.extractfile(member) if extension in wanted else None
            members[extension] = _Member(
                member.offset_data, content.read() if content else b"", not member.issparse()
            )
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

    def drain(self, path: Location) -> None:
        """Read what follows the end of the archive.

        Raises:
            UserError: it is more than padding: nobody would see what is in it.
        """
        while data := self.read(_CHUNK):
            if data.strip(b"\0"):
                raise UserError(
                    f"{path}: expected nothing after the end of the archive, found more, as of tars "
                    "joined by cat. Readers end there: unpack it with tar -xi and pack it again."
                )


def _printable(name: str) -> str:
    """A name whose bytes are no UTF-8 in a form that can be written."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
