"""The hashes of a split's tables, which the manifest keeps: of its index, label columns and content hashes.

What is hashed is the rows. A run hashes them at its start in any case, by which it knows its data again; so
that to compare them with the manifest costs nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

TABLES = {"index": "offset index", "labels": "label columns", "hashes": "content hashes"}
"""The names in `<split>.<name>.npy`, and what they are."""


def table_hash(rows: np.ndarray) -> str:
    """The SHA-256 of a table's rows, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(rows).view(np.uint8).data).hexdigest()


def table_hashes(directory: Path, split: str) -> dict[str, str]:
    """By name the hash of every table of the split that lies in `directory`."""
    paths = {name: directory / f"{split}.{name}.npy" for name in TABLES}
    return {
        name: table_hash(np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)))
        for name, path in paths.items()
        if path.is_file()
    }
