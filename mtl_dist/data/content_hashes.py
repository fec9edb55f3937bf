"""Content hashes: they find the same image in two splits, also of two datasets, without reading it.

    train.hashes.npy   <u8 per sample: the first 8 bytes of the SHA-256 of the image's bytes

The rows are those of the index. Eight bytes suffice: ten million images and ten million others agree by
chance once in 180,000 such comparisons. Only the very same bytes are found: not an image that was
written again, cut or made smaller.
"""

from __future__ import annotations

import hashlib

import numpy as np

from mtl_dist.data.manifest import HashFiles
from mtl_dist.data.remote import Place

HASH_SIZE = 8
HASH_DTYPE = np.dtype("<u8")
_ROWS_AT_A_TIME = 1 << 20


def content_hash(image: bytes) -> bytes:
    """The content hash of an encoded image."""
    return hashlib.sha256(image).digest()[:HASH_SIZE]


def content_hashes_path(directory: Place, split: str, name: HashFiles = "hashes") -> Place:
    """Where the content hashes of a split lie; `name` is what the manifest says."""
    return directory / f"{split}.{name}.npy"


def same_rows(few: np.ndarray, many: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a column of content hashes that another one holds too, and the first row there of each.

    It takes memory for `few` alone: `many` may be a mapping of a file.
    """
    values, inverse = np.unique(few, return_inverse=True)
    partner = np.full(len(values), -1)
    for start in range(0, len(many) if len(values) else 0, _ROWS_AT_A_TIME):
        part = many[start : start + _ROWS_AT_A_TIME]
        at = np.minimum(np.searchsorted(values, part), len(values) - 1)
        hits = np.flatnonzero(values[at] == part)
        found, first = np.unique(at[hits], return_index=True)
        partner[found] = np.where(partner[found] < 0, start + hits[first], partner[found])
    partners = partner[inverse]
    in_few = np.flatnonzero(partners >= 0)
    return in_few, partners[in_few]
