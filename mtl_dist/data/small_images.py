"""Small images, such as 28x28, read and decoded a batch at a time.

One by one, the calls that read, decode and convert a small image cost ten times what its bytes do. Here the
bytes of a sample, its labels among them, come by one system call, PNGs go straight to libpng, .npy files are
copied, and labels that were seen before are not parsed again.

This module is a short cut and decides nothing: a file that is not plain and whole is read as any sample is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mtl_dist.data.decode import npy_header
from mtl_dist.data.libpng import find_libpng
from mtl_dist.data.reader import SampleReader
from mtl_dist.data.shards import read_key

LARGEST = 1 << 14
"""Bytes of an image file beyond which there is nothing to win."""

_LONGEST = 1 << 16
"""Bytes that hold an image, its header and its labels; masks may lie between them."""

_HEADER = 512
_NPY = b"\x93NUMPY\x01"


@dataclass(frozen=True)
class SmallImages:
    """What was read: images (B, H, W, C), keys and labels; `read` says which samples they are."""

    images_BHWC: np.ndarray
    keys: list[str]
    labels: list[dict[str, Any]]
    read: np.ndarray


def read_small_images(
    reader: SampleReader, rows: np.ndarray, shape: tuple[int, int, int]
) -> SmallImages | None:
    """Those rows that are small 8-bit images of this shape (H, W, C); nothing if they are not small."""
    offsets, sizes = reader.spans("image", rows)
    if not reader.has_blocks or sizes.max(initial=0) > LARGEST:
        return None
    json_offsets, json_sizes = reader.spans("json", rows)
    images_BHWC = np.empty((len(rows), *shape), np.uint8)
    flat = images_BHWC.reshape(len(rows), -1)
    address, stride = images_BHWC.__array_interface__["data"][0], flat.shape[1]
    keys, labels, read = [""] * len(rows), [dict[str, Any]()] * len(rows), np.zeros(len(rows), dtype=bool)
    libpng = find_libpng()
    shards = map(reader.shard_of, rows.tolist())
    spans = zip(offsets.tolist(), sizes.tolist(), json_offsets.tolist(), json_sizes.tolist(), strict=True)
    for i, (row, shard, (at, size, json_at, json_size)) in enumerate(
        zip(rows.tolist(), shards, spans, strict=True)
    ):
        header = at - _HEADER
        begin, end = min(header, json_at), max(at + size, json_at + json_size)
        if begin < 0 or end - begin > _LONGEST:
            continue
        block = reader.block(shard, begin, end - begin)
        if len(block) < end - begin:
            continue
        parsed = _parsed(block[json_at - begin : json_at - begin + json_size])
        data = block[at - begin : at - begin + size]
        if data.startswith(_NPY):
            pixels = _begin_of_pixels(data[: 10 + data[8] + 256 * data[9]], shape)
            done = pixels + stride == size
            if done:
                flat[i] = np.frombuffer(data, np.uint8, stride, pixels)
        else:
            done = libpng is not None and libpng.decode(data, *shape, address + i * stride)
        if done and parsed is not None:
            keys[i], labels[i], read[i] = _key(block, header - begin), reader.with_derived(parsed, row), True
    return SmallImages(images_BHWC, keys, labels, read)


def _key(block: bytes, header: int) -> str:
    """`read_key` of the member whose header begins there, with a short way for the names that are usual."""
    name = block[header : header + 100]
    if b"/" in name or block[header + 345]:
        return read_key(block, header + _HEADER)
    return name.partition(b"\0")[0].partition(b".")[0].decode("utf-8", "replace")


@lru_cache(maxsize=64)
def _begin_of_pixels(header: bytes, shape: tuple[int, int, int]) -> int:
    """Where the pixels of an .npy file begin; -1 if it holds anything else than 8-bit ones of this shape."""
    try:
        found, transposed, dtype = npy_header(header)
    except ValueError:
        return -1
    plain = dtype == np.uint8 and not transposed and found in (shape, shape[:2])
    return len(header) if plain and math.prod(found) == math.prod(shape) else -1


@lru_cache(maxsize=4096)
def _parsed(text: bytes) -> dict[str, Any] | None:
    """The labels; nothing if they are not a JSON object. The dictionary is shared and must not be changed."""
    try:
        labels = json.loads(text)
    except ValueError:
        return None
    return labels if isinstance(labels, dict) else None
