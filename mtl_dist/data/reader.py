"""Reads the samples of one split from its tars, by row, in one system call each.

The index is memory-mapped and the tars are read by `preadv`, which takes its offset as an argument: a forked
worker may use the descriptors that it inherits, and nothing here has a position that could be shared.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mtl_dist.data.columns import NO_CLASS, columns_dtype, labels_at, labels_path
from mtl_dist.data.manifest import Manifest
from mtl_dist.data.shards import index_dtype, index_path, read_key, segmentation_tasks
from mtl_dist.errors import UserError

_HEADER = 512
_MAX_OPEN = 128  # more than a window of shards has, far fewer than a process may open
_MAX_GAP = 1 << 16  # unwanted bytes between two members that are cheaper to read than to skip


@dataclass(frozen=True)
class Sample:
    """One sample as it is stored: nothing decoded but the labels."""

    key: str
    image: memoryview
    labels: dict[str, Any]
    masks: dict[str, memoryview]


class UnreadableSample(Exception):
    """The bytes of a sample cannot be read; the message says why, without naming the sample."""


class SplitReader:
    """The samples of one split of a dataset, by row (0 .. num_samples - 1, in shard order).

    Raises:
        UserError: the index or a shard is missing, or is not the one in the manifest.
    """

    def __init__(self, directory: Path, manifest: Manifest, split: str) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        shards = manifest.splits[split].shards
        self.num_samples = manifest.splits[split].num_samples
        self.shard_sizes = tuple(shard.num_samples for shard in shards)
        self._paths = [directory / shard.path for shard in shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._bits = {task: np.uint64(1 << bit) for bit, task in enumerate(manifest.tasks)}
        self._segmentation = segmentation_tasks({name: info.kind for name, info in manifest.tasks.items()})
        self._index_path = index_path(directory, split)
        self._columns_path = labels_path(directory, split)
        self._labels_in_json = manifest.labels == "json"
        self._infos = manifest.tasks
        names = index_dtype(self._segmentation).names or ()
        self._spans = {
            name.removesuffix("_offset"): slice(at, at + 2)  # (offset, size)
            for at, name in enumerate(names)
            if name.endswith("_offset")
        }
        self._index: np.ndarray | None = None
        self._columns: np.ndarray | None = None
        for path, shard in zip(self._paths, shards, strict=True):
            _check_size(path, shard.num_bytes)
        self._rows()
        if not self._labels_in_json:
            self._column_rows()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # For workers that are not forked: neither descriptors nor a mapping can be sent to them.
        return self.__dict__ | {"_index": None, "_columns": None, "_files": OrderedDict()}

    def labelled(self, task: str, rows: np.ndarray) -> np.ndarray:
        """Which of the rows have a label for the task, bool (N,); none where the dataset lacks the task."""
        if task not in self._bits:
            return np.zeros(len(rows), dtype=bool)
        bits: np.ndarray = self._rows()["labelled"][rows] & self._bits[task]
        return bits != 0

    def classes(self, task: str) -> np.ndarray:
        """The class of each row, -1 where it has no label for the task, int32 (num_samples,).

        Raises:
            UserError: the dataset has no label columns.
        """
        if task not in self._bits:
            return np.full(self.num_samples, NO_CLASS, dtype=np.int32)
        if not self._columns_path.is_file():
            raise UserError(
                f"{self._columns_path}: expected the label columns of the split, found no such file. "
                "Prepare the dataset again."
            )
        column: np.ndarray = self._column_rows()[task]
        return column

    def read(self, row: int, masks: tuple[str, ...] = ()) -> Sample:
        """The sample at `row`, with its masks of the tasks named.

        Raises:
            UnreadableSample: a read fails or ends early, a mask is missing, or the labels are not a JSON
                object.
        """
        fields = self._rows()[row].item()
        stored = ("image", "json", *masks) if self._labels_in_json else ("image", *masks)
        spans = {name: fields[self._spans[name]] for name in stored}
        for task in masks:
            if spans[task][1] == 0:
                raise UnreadableSample(f"it has no mask {task}, which the index says it has")
        header = spans["image"][0] - _HEADER
        begin = min(header, *(offset for offset, _ in spans.values()))
        end = max(offset + size for offset, size in spans.values())
        shard = self.shard_of(row)
        if end - begin <= sum(size for _, size in spans.values()) + _MAX_GAP:
            block = self._pread(shard, begin, end - begin)
            parts = {name: block[at - begin : at - begin + size] for name, (at, size) in spans.items()}
            key = read_key(block, spans["image"][0] - begin)
        else:
            parts = {name: self._pread(shard, at, size) for name, (at, size) in spans.items()}
            key = self.key(row)
        return Sample(
            key=key,
            image=parts.pop("image"),
            labels=_labels(parts.pop("json")) if "json" in parts else self._column_labels(row),
            masks=parts,
        )

    def key(self, row: int) -> str:
        """The sample's key, from its tar header."""
        offset = int(self._rows()[row]["image_offset"])
        return read_key(self._pread(self.shard_of(row), offset - _HEADER, _HEADER), _HEADER)

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
            self._index = _mapped(self._index_path, index_dtype(self._segmentation), self.num_samples)
        return self._index

    def _column_rows(self) -> np.ndarray:
        if self._columns is None:
            self._columns = _mapped(self._columns_path, columns_dtype(self._infos), self.num_samples)
        return self._columns

    def _column_labels(self, row: int) -> dict[str, Any]:
        labelled = self._rows()["labelled"][row]
        return labels_at(
            self._column_rows(), row, [name for name, bit in self._bits.items() if labelled & bit]
        )

    def _pread(self, shard: int, offset: int, size: int) -> memoryview:
        """Bytes of a shard, writable because torch wants to wrap them without a copy."""
        data = memoryview(bytearray(size))
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
        if len(self._files) >= _MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
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


def _mapped(path: Path, dtype: np.dtype[np.void], num_rows: int) -> np.ndarray:
    """The rows of an index or of label columns, memory-mapped."""
    try:
        # As a plain array: every access to a `memmap` object costs what reading a sample costs.
        rows = np.asarray(np.load(path, mmap_mode="r"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: expected the index of the split, found no such file. Prepare the dataset again."
        ) from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: expected an index, found: {error}. Prepare the dataset again.") from None
    if rows.dtype != dtype or rows.shape != (num_rows,):
        raise UserError(
            f"{path}: expected {num_rows} rows of the tasks in dataset.json, found {len(rows)} of "
            f"{', '.join(rows.dtype.names or ('another kind',))}. Prepare the dataset again."
        )
    return rows


def _labels(text: memoryview) -> dict[str, Any]:
    try:
        labels = json.loads(str(text, "utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        labels = None
    if not isinstance(labels, dict):
        raise UnreadableSample("its labels are not a JSON object")
    return labels
