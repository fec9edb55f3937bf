"""The tables of a split beside its tars: index, label columns, content hashes; large ones memory-mapped."""

from __future__ import annotations

import io
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from mtl_dist.data.cache import Cache
from mtl_dist.data.remote import Location
from mtl_dist.errors import UserError

MAX_COPIED = 1 << 26
"""The bytes of a table that each process copies; a larger one is in memory once for all of a machine."""


class SplitTables:
    """Reads the tables of one split, which have a row for each sample; `version` is that of remote ones."""

    def __init__(self, num_samples: int, cache: Cache | None, version: str) -> None:
        self._num_samples = num_samples
        self._cache = cache
        self._version = version
        self._mapped: dict[Path, int] = {}
        """Those that are memory-mapped, and their sizes."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # whoever gets a copy reads them again

    def read(self, location: Location, dtype: np.dtype[Any]) -> np.ndarray:
        """The rows of an index, of label columns or of content hashes.

        Raises:
            UserError: they are missing, damaged, or of other samples or tasks.
        """
        try:
            if isinstance(location, Path):
                num_bytes = location.stat().st_size
                if num_bytes > MAX_COPIED:
                    self._mapped[location] = num_bytes
                # As a plain array: every access to a `memmap` object costs what reading a sample costs.
                rows = np.asarray(np.load(location, mmap_mode="r" if location in self._mapped else None))
            elif self._cache is None:
                rows = np.load(io.BytesIO(location.read_all()))
            else:
                rows = _mapped(self._cache.open(location, version=self._version))
        except FileNotFoundError:
            raise UserError(
                f"{location}: expected the index of the split, found no such file. Prepare the dataset again."
            ) from None
        except UserError:
            raise
        except Exception as error:  # whatever numpy raises of a damaged header
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{location}: expected an index, found: {reason}. Prepare the dataset again."
            ) from None
        if rows.dtype != dtype or rows.shape != (self._num_samples,):
            raise UserError(
                f"{location}: expected {self._num_samples} rows of the tasks in dataset.json, found "
                f"{len(rows)} of {', '.join(rows.dtype.names or ('another kind',))}. "
                "Prepare the dataset again."
            )
        return rows

    def check(self) -> None:
        """Refuse tables that were shortened since they were opened: to read on would be a bus error.

        Raises:
            UserError: one was.
        """
        for path, expected in self._mapped.items():
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                continue  # what is open stays whole
            if found < expected:
                raise UserError(
                    f"{path}: expected {expected:,} bytes as at the start, found {found:,}: it was shortened "
                    "while it was read. Copy it again, or prepare the dataset again."
                )


def _mapped(descriptor: int) -> np.ndarray:
    """The array of an open .npy file, memory-mapped: its name may vanish from a cache at any time."""
    with os.fdopen(descriptor, "rb") as file:
        read = (np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0)
        shape, _, dtype = read[np.lib.format.read_magic(file)[0] - 1](file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        start = file.tell()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, dtype, offset=start).reshape(shape)
