"""Reads the samples of one split from its tars, by row, in one system call each.

Tars are never memory-mapped: one that is shortened while it is read would end the process by a bus error.
They are read by `preadv`, which takes its offset as an argument: a forked worker may
use the descriptors that it inherits, and nothing here has a position that could be shared.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mtl_dist.data.cache import Cache
from mtl_dist.data.columns import columns_dtype, labels_at, labels_path
from mtl_dist.data.content_hashes import HASH_DTYPE, content_hashes_path
from mtl_dist.data.derived import Derivation, OfImages, OfLabels
from mtl_dist.data.images import UnreadableImage, open_map
from mtl_dist.data.manifest import Manifest
from mtl_dist.data.remote import Location, Url, beside, read_together
from mtl_dist.data.shards import index_dtype, index_path, map_tasks, read_key
from mtl_dist.data.split_tables import SplitTables
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import UnreadableMap
from mtl_dist.kinds.registry import map_kind
from mtl_dist.kinds.vocabulary import LabelError
from mtl_dist.specs import NO_CLASS, TaskInfo

_HEADER = 512
_MAX_OPEN = 128  # more than a window of shards has, far fewer than a process may open
_MAX_OPEN_CACHED = 16  # a file that is open takes disk space although the cache has removed it
_MAX_GAP = 1 << 16  # unwanted bytes between two members that are cheaper to read than to skip


@dataclass(frozen=True)
class Sample:
    """One sample as it is stored: nothing decoded but the labels, and maps that others wrote by value."""

    key: str
    image: memoryview
    labels: dict[str, Any]
    masks: dict[str, memoryview]


class UnreadableSample(Exception):
    """The bytes of a sample cannot be read; the message says why, without naming the sample."""


def restored(task: str, data: memoryview, info: TaskInfo, values: Mapping[int, int]) -> memoryview:
    """A map that others wrote, as a shard of ours would hold it: `values` are the classes of its values.

    Raises:
        UnreadableSample: it is no such map.
    """
    try:
        with open_map(bytes(data)) as opened:
            return memoryview(map_kind(info.kind).reread(bytes(data), opened, info, values))
    except (UnreadableImage, UnreadableMap, LabelError) as error:
        raise UnreadableSample(f"its mask {task}: {str(error).rstrip('.')}") from None


class SampleReader(Protocol):
    """What batches are built from: samples by their rows."""

    @property
    def is_remote(self) -> bool: ...

    def labelled(self, task: str, rows: np.ndarray) -> np.ndarray: ...

    def spans(self, part: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def read(self, row: int, masks: tuple[str, ...] = ()) -> Sample: ...

    def with_derived(self, labels: dict[str, Any], row: int) -> dict[str, Any]: ...

    def prefetch(self, rows: Sequence[int], masks: Sequence[tuple[str, ...]]) -> None: ...

    def check_tables(self) -> None: ...

    @property
    def has_blocks(self) -> bool: ...

    def block(self, shard: int, begin: int, size: int) -> bytes: ...

    def shard_of(self, row: int) -> int: ...

    def where(self, row: int) -> str: ...


class SplitReader:
    """The samples of one split of a dataset, by row (0 .. num_samples - 1, in shard order).

    Their labels are those that are stored, and those of the `derived` tasks.

    Raises:
        UserError: the index or a shard is missing, or is not the one in the manifest.
    """

    def __init__(
        self,
        directory: Location,
        manifest: Manifest,
        split: str,
        cache: Cache | None = None,
        derived: Mapping[str, Derivation] | None = None,
    ) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        shards = manifest.splits[split].shards
        self.num_samples = manifest.splits[split].num_samples
        self.shard_sizes = tuple(shard.num_samples for shard in shards)
        self._shards = shards
        self._paths = [beside(directory, shard.path) for shard in shards]
        self._cache = cache
        self.is_remote = cache is None and any(isinstance(path, Url) for path in self._paths)
        """Whether samples are read by requests over the network."""
        self._ends = list(accumulate(self.shard_sizes))
        self._bits = {task: np.uint64(1 << bit) for bit, task in enumerate(manifest.tasks)}
        self._maps_of = map_tasks({name: info.kind for name, info in manifest.tasks.items()})
        self._index_path = index_path(directory, split)
        self._columns_path = labels_path(directory, split)
        named = manifest.content_hashes
        self._hashes_path = content_hashes_path(directory, split, named) if named else None
        self._labels_in_json = manifest.labels == "json"
        self._task_infos = manifest.tasks
        self._values = manifest.values
        self._derived = dict(derived or {})
        self._derived_classes: dict[str, np.ndarray] = {}
        described = (manifest.tasks, manifest.splits[split], *filter(None, [manifest.values]))
        self._version = hashlib.sha256(repr(described).encode()).hexdigest()
        names = index_dtype(self._maps_of).names or ()
        self._spans = {
            name.removesuffix("_offset"): slice(at, at + 2)  # (offset, size)
            for at, name in enumerate(names)
            if name.endswith("_offset")
        }
        self._tables = SplitTables(self.num_samples, cache, self._version)
        self._index: np.ndarray | None = None
        self._columns: np.ndarray | None = None
        self._prefetched: dict[tuple[int, int, int], bytes] = {}
        for path, shard in zip(self._paths, shards, strict=True):
            if isinstance(path, Path):  # of a URL it would be a request each; reading will show it
                _check_size(path, shard.num_bytes)
        self._rows()
        if not self._labels_in_json:
            self._column_rows()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # For workers that are not forked: neither descriptors nor a mapping can be sent to them.
        return self.__dict__ | {
            "_index": None,
            "_columns": None,
            "_files": OrderedDict(),
            "_prefetched": {},
        }

    def labelled(self, task: str, rows: np.ndarray) -> np.ndarray:
        """Which of the rows have a label for the task, bool (N,); none where the dataset lacks the task."""
        if task in self._derived:
            derivation = self._derived[task]
            if not isinstance(derivation, OfLabels):
                return self.classes(task)[rows] != NO_CLASS
            has = self.labelled(derivation.source, rows)
            if derivation.keeps_all:
                return has
            return has & (self.classes(task)[rows] != NO_CLASS)
        if task not in self._bits:
            return np.zeros(len(rows), dtype=bool)
        bits: np.ndarray = self._rows()["labelled"][rows] & self._bits[task]
        return bits != 0

    def classes(self, task: str) -> np.ndarray:
        """The class of each row, -1 where it has no label for the task, int32 (num_samples,).

        Raises:
            UserError: the dataset has no label columns.
        """
        if task in self._derived:
            derivation = self._derived[task]
            if isinstance(derivation, OfLabels) and task not in self._derived_classes:
                self._derived_classes[task] = derivation.of_column(self.column(derivation.source))
            return self._derived_classes[task]
        if task not in self._bits:
            return np.full(self.num_samples, NO_CLASS, dtype=np.int32)
        return self.column(task)

    def know(self, classes: Mapping[str, np.ndarray]) -> None:
        """Take the class of each row for the derived tasks that are made of images."""
        self._derived_classes |= classes

    def derived_classes(self) -> dict[str, np.ndarray]:
        """What `know` was told."""
        return {
            task: self._derived_classes[task]
            for task, derivation in self._derived.items()
            if isinstance(derivation, OfImages)
        }

    @property
    def content(self) -> str:
        """A hash of what the manifest says of the tasks and of the split, shards included."""
        return self._version

    def column(self, task: str) -> np.ndarray:
        """What is stored of a task whose labels are no maps, for each row.

        Raises:
            UserError: the dataset has no label columns.
        """
        if isinstance(self._columns_path, Path) and not self._columns_path.is_file():
            raise UserError(
                f"{self._columns_path}: expected the label columns of the split, found no such file. "
                "Prepare the dataset again."
            )
        column: np.ndarray = self._column_rows()[task]
        return column

    def content_hashes(self) -> np.ndarray | None:
        """By which the same image is found elsewhere, uint64 (num_samples,); None where none are kept.

        Raises:
            UserError: the file that the manifest promises is missing or of other samples.
        """
        return None if self._hashes_path is None else self._tables.read(self._hashes_path, HASH_DTYPE)

    def index_rows(self) -> np.ndarray:
        """The offset index, one packed row per sample."""
        return self._rows()

    def label_columns(self) -> np.ndarray | None:
        """The label columns; None where the labels are read from the shards and no columns lie beside them.

        Raises:
            UserError: they are of other samples or tasks.
        """
        if self._labels_in_json and not (
            isinstance(self._columns_path, Path) and self._columns_path.is_file()
        ):
            return None
        return self._column_rows()

    def read(self, row: int, masks: tuple[str, ...] = ()) -> Sample:
        """The sample at `row`, with its masks of the tasks named.

        Raises:
            UnreadableSample: a read fails or ends early, a mask is missing, or the labels are not a JSON
                object.
        """
        spans = self._spans_at(row, masks)
        for task in masks:
            if spans[task][1] == 0:
                raise UnreadableSample(f"it has no mask {task}, which the index says it has")
        begin, end, wanted = _extent(spans)
        shard = self.shard_of(row)
        if begin < 0 or end > self._shards[shard].num_bytes:
            raise UnreadableSample("the index places it outside of its shard")
        if end - begin <= wanted + _MAX_GAP:
            block = self._pread(shard, begin, end - begin)
            if self._labels_in_json:  # a shard of ours: others' tars have headers of any form
                _check_headers(block, begin, spans)
            parts = {name: block[at - begin : at - begin + size] for name, (at, size) in spans.items()}
            key = read_key(block, spans["image"][0] - begin)
        else:
            parts = {name: self._pread(shard, at, size) for name, (at, size) in spans.items()}
            key = self.key(row)
        for task, values in self._values.items():
            if task in parts:
                parts[task] = restored(task, parts[task], self._task_infos[task], values)
        return Sample(
            key=key,
            image=parts.pop("image"),
            labels=self.with_derived(
                _labels(parts.pop("json")) if "json" in parts else self._column_labels(row), row
            ),
            masks=parts,
        )

    def with_derived(self, labels: dict[str, Any], row: int) -> dict[str, Any]:
        """The labels of the sample at `row` with those of the derived tasks; `labels` is not changed."""
        for name, derivation in self._derived.items():
            if isinstance(derivation, OfLabels):
                stored = labels.get(derivation.source)
                target = derivation.of_label(stored) if isinstance(stored, int | float) else NO_CLASS
            else:
                target = int(self.classes(name)[row])
            if target != NO_CLASS:
                labels = {**labels, name: target}
        return labels

    def prefetch(self, rows: Sequence[int], masks: Sequence[tuple[str, ...]]) -> None:
        """Ask for all of these samples at once, if each is going to be a request; `read` then finds them.

        What does not come is asked for again by `read`, which also says what is wrong.
        """
        self._prefetched.clear()
        ranges: dict[tuple[int, int, int], None] = {}  # a set in order: padding repeats samples
        for row, of_row in zip(rows, masks, strict=True):
            begin, end, wanted = _extent(self._spans_at(row, of_row))
            shard = self.shard_of(row)
            if isinstance(self._paths[shard], Url) and end - begin <= wanted + _MAX_GAP:
                ranges[shard, begin, end - begin] = None
        urls = [
            (url, begin, size) for shard, begin, size in ranges if isinstance(url := self._paths[shard], Url)
        ]
        if urls:
            self._prefetched = {
                r: d for r, d in zip(ranges, read_together(urls), strict=True) if d is not None
            }

    def remote_bytes(self, shard: int) -> int:
        """The size of a shard that comes into the cache over the network; 0 for any other."""
        is_cached = self._cache is not None and isinstance(self._paths[shard], Url)
        return self._shards[shard].num_bytes if is_cached else 0

    def fetch(self, shard: int) -> None:
        """Bring such a shard into the cache.

        Raises:
            UserError: it cannot be had.
        """
        location, info = self._paths[shard], self._shards[shard]
        if self._cache is not None and isinstance(location, Url):
            os.close(self._cache.open(location, info.num_bytes, info.sha256))

    def _spans_at(self, row: int, masks: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """(offset, size) of each part of the sample at `row`."""
        fields = self._rows()[row].item()
        stored = ("image", "json", *masks) if self._labels_in_json else ("image", *masks)
        return {name: fields[self._spans[name]] for name in stored}

    def spans(self, part: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the part ("image", "json" or a mask's task) of each row lies in its shard: offsets, sizes."""
        index = self._rows()[rows]
        return index[f"{part}_offset"], index[f"{part}_size"]

    @property
    def has_blocks(self) -> bool:
        """Whether the samples are in local files, with labels of ours beside the images."""
        return self._labels_in_json and (
            self._cache is not None or not any(isinstance(path, Url) for path in self._paths)
        )

    def block(self, shard: int, begin: int, size: int) -> bytes:
        """Bytes of a shard in one system call; fewer where it ends too early or cannot be read.

        For small samples, where `read` would cost more than decoding does. The file is read ahead, because
        samples of it are going to be asked for in any order.
        """
        if begin < 0 or begin + size > self._shards[shard].num_bytes:
            return b""
        is_new = shard not in self._files
        try:
            descriptor = self._descriptor(shard)
            if is_new and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            return os.pread(descriptor, size, begin)
        except (OSError, UserError):
            return b""  # `read` says what is wrong

    def key(self, row: int) -> str:
        """The sample's key, from its tar header."""
        offset, shard = int(self._rows()[row]["image_offset"]), self.shard_of(row)
        if not _HEADER <= offset <= self._shards[shard].num_bytes:
            raise UnreadableSample("the index places it outside of its shard")
        return read_key(self._pread(shard, offset - _HEADER, _HEADER), _HEADER)

    def where(self, row: int) -> str:
        """The sample's shard and key in words, for messages."""
        path = self._paths[self.shard_of(row)]
        try:
            return f"{path}, sample {self.key(row)}"
        except UnreadableSample:
            return f"{path}, row {row} of {self._index_path.name}"

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds the row."""
        return bisect_right(self._ends, row)

    def _rows(self) -> np.ndarray:
        if self._index is None:
            self._index = self._tables.read(self._index_path, index_dtype(self._maps_of))
        return self._index

    def _column_rows(self) -> np.ndarray:
        if self._columns is None:
            self._columns = self._tables.read(self._columns_path, columns_dtype(self._task_infos))
        return self._columns

    def _column_labels(self, row: int) -> dict[str, Any]:
        labelled = self._rows()["labelled"][row]
        return labels_at(
            self._column_rows(),
            row,
            {n: self._task_infos[n] for n, bit in self._bits.items() if labelled & bit},
        )

    def check_tables(self) -> None:
        """Refuse tables that were shortened since they were opened.

        Raises:
            UserError: one was.
        """
        self._tables.check()

    def _pread(self, shard: int, offset: int, size: int) -> memoryview:
        """Bytes of a shard, writable because torch wants to wrap them without a copy."""
        location = self._paths[shard]
        if isinstance(location, Url) and self._cache is None:
            prefetched = self._prefetched.get((shard, offset, size))
            return memoryview(bytearray(location.read(offset, size) if prefetched is None else prefetched))
        data = np.empty(size, np.uint8).data  # a bytearray would be zeroed first
        filled = 0
        while filled < size:
            try:
                count = os.preadv(self._descriptor(shard), [data[filled:]], offset + filled)
            except OSError as error:
                raise UnreadableSample(error.strerror or str(error)) from None
            if count == 0:
                raise UnreadableSample(f"its shard ends {size - filled} bytes too early")
            filled += count
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= (_MAX_OPEN if self._cache is None else _MAX_OPEN_CACHED):
            os.close(self._files.popitem(last=False)[1])
        location = self._paths[shard]
        if isinstance(location, Path):
            self._files[shard] = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
        else:
            assert self._cache is not None
            info = self._shards[shard]
            self._files[shard] = self._cache.open(location, info.num_bytes, info.sha256)
        return self._files[shard]

    def close(self) -> None:
        """Close the tars; they open again when they are read."""
        while self._files:
            os.close(self._files.popitem()[1])


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{path}: expected a shard of {expected:,} bytes, found no such file. "
            "Copy it again, or prepare the dataset again."
        ) from None
    if found != expected:
        raise UserError(
            f"{path}: expected a shard of {expected:,} bytes, found {found:,}. "
            "Copy it again, or prepare the dataset again."
        )


def _extent(spans: Mapping[str, tuple[int, int]]) -> tuple[int, int, int]:
    """Where the parts of a sample begin (the image with its header) and end, and how many bytes they are."""
    begin, end, wanted = spans["image"][0] - _HEADER, 0, 0
    for offset, size in spans.values():  # for every sample that is read: generators would take four times it
        begin, end, wanted = min(begin, offset), max(end, offset + size), wanted + size
    return begin, end, wanted


def _check_headers(block: memoryview, begin: int, spans: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an index that does not fit its shard: before each part stands a header with its size, where the
    block has it; that of the image it always has.

    Raises:
        UnreadableSample: there is none, or one of another member.
    """
    for at, size in spans.values():
        start = at - begin - _HEADER
        if start >= 0 and block[start + 124 : start + 136] != b"%011o\0" % size:
            raise UnreadableSample("the index does not fit its shard: no member of that size is there")


def _labels(text: memoryview) -> dict[str, Any]:
    try:
        labels = json.loads(str(text, "utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        labels = None
    if not isinstance(labels, dict):
        raise UnreadableSample("its labels are not a JSON object")
    return labels
