"""The GPUs that this process may use, without importing torch (2 s) where there can be none."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from mtl_dist.lazy import torch

_CUDA = ("libcuda.so.1", "nvcuda.dll")
"""NVIDIA's driver, without which torch sees no GPU of theirs, under Linux and Windows."""

_ROCM = Path("/dev/kfd")
"""AMD's."""


def num_gpus() -> int:
    """How many there are, as torch counts them."""
    return torch.cuda.device_count() if has_driver() else 0


def visible_gpus() -> list[str]:
    """The same, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = num_gpus()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def has_driver() -> bool:
    return _ROCM.exists() or any(map(loads, _CUDA))


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
