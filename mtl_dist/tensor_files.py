"""Tensors of a safetensors file: written as other files are, and read into memory of their own.

The library maps the file into memory, and its tensors stay views of it: a file that is shortened afterwards
(copied over, a full disk) is a bus error at the next touch. Read like this it is one line.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mtl_dist.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_MAX_HEADER = 100_000_000
"""Bytes, as the library has it."""


@dataclass(frozen=True)
class _Place:
    """A tensor in a file: what it is, and where its bytes begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the tensors, readable for whom any file made here is: the library lets nobody but the owner.

    Raises:
        OSError: what the disk says, which the library tells in an error of its own, in words.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    if path.stat().st_mode != mode:
        path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, by name.

    Raises:
        UserError: the file is none of safetensors, or shorter than it says.
        OSError: it cannot be read.
    """
    return dict(each_tensor(path))


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file with their names, one after the other; raises what `read_tensors` raises."""
    with open(path, "rb", buffering=0) as file:
        for name, place in _places(path, file).items():
            tensor = torch.empty(place.shape, dtype=place.dtype)
            if place.num_bytes:
                view = tensor.reshape(-1).view(torch.uint8).numpy().data
                file.seek(place.offset)
                filled = 0
                while filled < place.num_bytes:
                    count = file.readinto(view[filled:])
                    if not count:
                        raise _damaged(path, f"its end {place.num_bytes - filled:,} bytes too early")
                    filled += count
            yield name, tensor


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the file; raises what `read_tensors` raises."""
    with open(path, "rb") as file:
        return {name: place.shape for name, place in _places(path, file).items()}


def _places(path: Path, file: BinaryIO) -> dict[str, _Place]:
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise _damaged(path, "no header")
    begin = 8 + length
    try:
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("no object")
        header.pop("__metadata__", None)
        return {str(name): _place(entry, begin, size) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"a header that is none ({' '.join(str(error).split())[:120]})") from None


def _place(entry: dict[str, list[int]], begin: int, size: int) -> _Place:
    dtype, shape = _DTYPES[str(entry["dtype"])], entry["shape"]
    first, last = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError("no numbers")
    num_bytes = math.prod(shape) * dtype.itemsize
    if last - first != num_bytes or begin + last > size:
        raise ValueError(f"a tensor of {num_bytes:,} bytes at {first:,} to {last:,}")
    return _Place(dtype, tuple(shape), begin + first, num_bytes)


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path}: expected tensors as safetensors writes them, found {found}. Use another copy.")
