"""Shards: plain WebDataset tars, and the packed index that finds a sample in them.

    train-000000.tar        <key>.jpg  <key>.json  <key>.<task>.png  ...
    train.index.npy         one packed row per sample of the split, in shard order

A sample is `<key>.<extension>`, the image bytes as they came; `<key>.json`, the scalar labels as a flat
object (an absent task is an absent label); and `<key>.<task>.png` or `.npy`, a label with a value for each
pixel, such as a mask of class indices (8-bit grey, 255 = ignore). The fields of an index row are

    image_offset <u8, image_size <u4, json_offset <u8, json_size <u4
    labelled     <u8: bit t is set where the sample has the label of task t, in the manifest's order
    <task>_offset <u8, <task>_size <u4: per task of maps; size 0 is no map

where an offset is that of the member's data inside its tar. The shard of row i follows from the shards'
sample counts in the manifest. One index per split, not one per shard: thousands of small files cost
minutes on a parallel file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from mtl_dist.data.manifest import ShardInfo
from mtl_dist.data.remote import Place
from mtl_dist.durable import replacing
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.registry import kind_of

MAX_TASKS = 64
MAX_KEY_LENGTH = 60
DEFAULT_SHARD_SAMPLES = 10_000
DEFAULT_SHARD_BYTES = 256 * 2**20

_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")
_BLOCK = 512
_RECORD = 20 * _BLOCK
"""A tar's length is a multiple of it."""
_NUL = b"\0"
_NPY = b"\x93NUMPY"
_REGULAR = (b"0", _NUL)
_DIRECTORY = b"5"


def check_task_names(names: Iterable[str]) -> None:
    """Refuse names of tasks that a shard cannot hold.

    Raises:
        UserError: a name that is not a plain word, is reserved, or differs from another only in case
            (WebDataset lowers the case of extensions); or more than 64 tasks.
    """
    tasks = dict.fromkeys(names)
    for name in tasks:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,29}", name) or name.lower() in ("image", "json"):
            raise UserError(
                f"task {name!r}: expected a name of at most 30 letters, digits and underscores that starts "
                "with a letter and is not 'image' or 'json'. Choose another name."
            )
    if len({name.lower() for name in tasks}) < len(tasks):
        raise UserError(f"tasks {', '.join(tasks)}: two names differ only in case. Rename one.")
    if len(tasks) > MAX_TASKS:
        raise UserError(f"tasks: expected at most {MAX_TASKS}, found {len(tasks)}.")


def map_tasks(tasks: Mapping[str, str]) -> tuple[str, ...]:
    """The tasks whose labels are maps, in the order of `tasks`, which gives each one's kind."""
    return tuple(name for name, kind in tasks.items() if kind_of(kind).is_map)


def map_member(task: str, data: bytes) -> str:
    """The extension of a map's member: `<task>.png`, or `<task>.npy` of an array."""
    return f"{task}.{'npy' if data.startswith(_NPY) else 'png'}"


def index_dtype(maps: Sequence[str]) -> np.dtype[np.void]:
    """The packed row of an index for these tasks of maps."""
    fields = [("image_offset", "<u8"), ("image_size", "<u4"), ("json_offset", "<u8"), ("json_size", "<u4")]
    fields.append(("labelled", "<u8"))
    for task in maps:
        fields += [(f"{task}_offset", "<u8"), (f"{task}_size", "<u4")]
    return np.dtype(fields)


def index_path(directory: Place, split: str) -> Place:
    """Where the index of a split lies."""
    return directory / f"{split}.index.npy"


def shard_name(split: str, number: int) -> str:
    """The file name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def save_index(path: Path, rows: np.ndarray) -> None:
    """Write an index durably."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows, allow_pickle=False)


class _HashingFile:
    """A file being written, hashed on the way: reading a shard again to hash it would double the IO."""

    def __init__(self, path: Path) -> None:
        self.hash = hashlib.sha256()
        self.num_bytes = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by `close` or `discard`)

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        with suppress(OSError):  # the reason to discard may be a full disk, which the last flush meets again
            self._file.close()


class TarShard:
    """Writes one tar and collects its index rows: the same bytes for the same samples."""

    def __init__(self, path: Path, tasks: Mapping[str, str]) -> None:
        self.path = path
        self._bits = {task: 1 << bit for bit, task in enumerate(tasks)}
        self._map_tasks = map_tasks(tasks)
        self._dtype = index_dtype(self._map_tasks)
        self._rows: list[tuple[int, ...]] = []
        self._file = _HashingFile(path)

    @property
    def num_samples(self) -> int:
        """The samples written so far."""
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """The bytes written so far, padding included."""
        return self._file.num_bytes

    def write(
        self, key: str, image: bytes, extension: str, labels: Mapping[str, Label], masks: Mapping[str, bytes]
    ) -> None:
        """Append one sample; `labels` and `masks` hold the tasks that it has a label for."""
        assert _KEY.fullmatch(key), key
        members = {extension: image, "json": _json_bytes(labels)}
        suffixes = {task: map_member(task, mask) for task, mask in masks.items()}
        members |= {suffixes[task]: mask for task, mask in masks.items()}
        offsets: dict[str, int] = {}
        offset = self.num_bytes
        pieces: list[bytes] = []
        for suffix, data in sorted(members.items()):  # WebDataset's order
            offsets[suffix] = offset + _BLOCK
            pieces += (_header(f"{key}.{suffix}", len(data)), data, bytes(-len(data) % _BLOCK))
            offset += _BLOCK + _padded(len(data))
        self._file.write(b"".join(pieces))

        labelled = sum(self._bits[task] for task in (*labels, *masks))
        row = [offsets[extension], len(image), offsets["json"], len(members["json"]), labelled]
        for task in self._map_tasks:
            row += [offsets[suffixes[task]], len(masks[task])] if task in masks else [0, 0]
        self._rows.append(tuple(row))

    def close(self) -> tuple[ShardInfo, np.ndarray]:
        """Finish the tar, durably; its line in the manifest and its rows in the index."""
        end = self.num_bytes + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % _RECORD))
        self._file.close()
        info = ShardInfo(self.path.name, self.num_samples, self._file.num_bytes, self._file.hash.hexdigest())
        return info, np.array(self._rows, dtype=self._dtype)

    def discard(self) -> None:
        """Give the tar up and delete it."""
        self._file.discard()
        self.path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one split, sample by sample: shards and their index.

    A shard is closed at `max_samples` samples or once it holds `max_bytes` bytes. Leaving the `with` block
    finishes the last shard and writes the index; `shards` then lists what was written. An exception in the
    block leaves the finished shards, and no index.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        tasks: Mapping[str, str],
        max_samples: int = DEFAULT_SHARD_SAMPLES,
        max_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        check_task_names(tasks)
        self.shards: list[ShardInfo] = []
        self._directory = directory
        self._split = split
        self._tasks = dict(tasks)
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._rows = [np.empty(0, index_dtype(map_tasks(tasks)))]
        self._shard: TarShard | None = None

    def write(
        self, key: str, image: bytes, extension: str, labels: Mapping[str, Label], masks: Mapping[str, bytes]
    ) -> None:
        """Append one sample; `labels` and `masks` hold the tasks that it has a label for."""
        if self._shard is None:
            path = self._directory / shard_name(self._split, len(self.shards))
            self._shard = TarShard(path, self._tasks)
        self._shard.write(key, image, extension, labels, masks)
        if self._shard.num_samples >= self._max_samples or self._shard.num_bytes >= self._max_bytes:
            self._finish_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._finish_shard()
            save_index(index_path(self._directory, self._split), np.concatenate(self._rows))
        elif self._shard is not None:
            self._shard.discard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            info, rows = self._shard.close()
            self.shards.append(info)
            self._rows.append(rows)
            self._shard = None


def scan_shard(path: Path, tasks: Mapping[str, str]) -> np.ndarray:
    """The index rows of one shard, rebuilt from its tar headers and label files.

    Raises:
        UserError: the file is not a whole tar, or a sample lacks its image or its labels, or has a member
            that is none of these.
    """
    bits = {task: 1 << bit for bit, task in enumerate(tasks)}
    masks = {f"{task}.{ext}": task for task in map_tasks(tasks) for ext in ("png", "npy")}
    dtype = index_dtype(map_tasks(tasks))
    samples: list[dict[str, int]] = []
    last_key = None
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise _damaged(path, "an empty file")
        for name, offset, size in members_of(path, file.fileno()):
            key, _, suffix = name.partition(".")
            if key != last_key:
                samples.append({"labelled": 0})
                last_key = key
            sample = samples[-1]
            if suffix == "json":
                field = "json"
                sample["labelled"] |= _labelled_bits(path, name, os.pread(file.fileno(), size, offset), bits)
            elif suffix in masks:
                field = masks[suffix]
                sample["labelled"] |= bits[field]
            elif suffix and "." not in suffix:
                field = "image"
            else:
                raise _damaged(path, f"the member {name!r}, which is no image, labels or mask of a task")
            if f"{field}_offset" in sample:
                raise _damaged(path, f"two members for {field!r} in the sample {key!r}")
            sample[f"{field}_offset"], sample[f"{field}_size"] = offset, size
    for number, sample in enumerate(samples):
        if "image_offset" not in sample or "json_offset" not in sample:
            raise _damaged(path, f"no image or no labels in sample {number}")
    return np.array([tuple(sample.get(field, 0) for field in dtype.names or ()) for sample in samples], dtype)


def read_name(shard: Path | bytes | memoryview, offset: int) -> str:
    """The name of the member whose data begins at `offset`, from the tar header before it."""
    if isinstance(shard, Path):
        with open(shard, "rb") as file:
            file.seek(offset - _BLOCK)
            header = file.read(_BLOCK)
    else:
        header = bytes(shard[offset - _BLOCK : offset])
    return _header_name(header)


def read_key(shard: Path | bytes | memoryview, offset: int) -> str:
    """The key of the sample one of whose members begins at `offset`: its name up to the file's first dot."""
    folder, slash, name = read_name(shard, offset).rpartition("/")
    return folder + slash + name.partition(".")[0]


def members_of(path: Path, tar: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of each regular file of an open tar.

    A header scan is several times tarfile's speed. Nothing is memory-mapped: to shorten the file meanwhile
    would be a bus error.
    """
    position, end = 0, os.fstat(tar).st_size
    while True:
        header = os.pread(tar, _BLOCK, position)
        if len(header) < _BLOCK:
            raise _damaged(path, "its end missing")
        if header[0] == 0:
            return
        kind = header[156:157]
        try:
            size = int(header[124:136].rstrip(b" \0"), 8)
        except ValueError:
            raise _damaged(path, f"no tar header at byte {position}") from None
        if header[257:262] != b"ustar" or kind not in (*_REGULAR, _DIRECTORY):
            raise _damaged(path, f"no plain ustar header at byte {position}")
        offset = position + _BLOCK
        position = offset + _padded(size)
        if position > end:
            raise _damaged(path, "its end missing")
        if kind != _DIRECTORY:
            yield _header_name(header), offset, size


def _header_name(header: bytes) -> str:
    name = header[:100].partition(_NUL)[0].decode("utf-8", "replace")
    prefix = header[345:500].partition(_NUL)[0].decode("utf-8", "replace")
    return f"{prefix}/{name}" if prefix else name


def _labelled_bits(path: Path, name: str, text: bytes, bits: Mapping[str, int]) -> int:
    try:
        return sum(bits[task] for task in json.loads(text))
    except KeyError as error:
        raise _damaged(path, f"a label of the unknown task {error} in {name!r}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        raise _damaged(path, f"no JSON object in {name!r}") from None


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path}: expected a shard of this dataset, found {found}. Prepare the dataset again.")


def _json_bytes(labels: Mapping[str, Label]) -> bytes:
    return json.dumps(dict(labels), separators=(",", ":"), sort_keys=True, allow_nan=False).encode("ascii")


def _header(name: str, size: int) -> bytes:
    """The block before a member: a plain file of user and group "mtl" that all may read, from 1970.

    tarfile makes the same in forty times as long.
    """
    block = bytearray(_HEADER)
    block[: len(name)] = name.encode("ascii")
    block[124:135] = b"%011o" % size
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def _blank_header() -> bytes:
    """What all members have in common, and blanks for the checksum."""
    block = bytearray(_BLOCK)
    for at, field in (
        (100, b"0000444"),  # mode
        (108, b"0000000"),  # user
        (116, b"0000000"),  # group
        (136, b"00000000000"),  # time
        (148, b"        "),
        (156, _REGULAR[0]),
        (257, b"ustar"),
        (263, b"00"),
        (265, b"mtl"),
        (297, b"mtl"),
    ):
        block[at : at + len(field)] = field
    return bytes(block)


_HEADER = _blank_header()


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
