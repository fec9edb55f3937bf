"""Keyed randomness without state: every number is a pure function of a key and a counter.

All that a run draws comes from here: the order, augmentation and blending of samples from keys
(`derive_key`), and what torch draws from seeds (`rank_seed`, `shared_seed`). Results depend on these, so what
they return never changes.

The hash is the finaliser of SplitMix64 (David Stafford's variant 13), the same in Python integers and in
numpy arrays. It does not depend on the version of a library, as numpy's and torch's generators may.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_STEP = 0xD1B54A32D192ED03
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_ROUNDS = 8
_SMALLEST_RADIX = np.uint64(4)  # with 2 or 3, eight rounds leave a bias that 100,000 keys show


def hash_int(value: int) -> int:
    """One 64-bit number from another, by a bijection that looks random."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """The 64-bit key of a tuple of integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = hash_int(key ^ hash_int(part & _MASK))
    return key


def hash_array(values: np.ndarray) -> np.ndarray:
    """`hash_int` of every element of a uint64 array."""
    values = values + np.uint64(_GAMMA)
    values ^= values >> np.uint64(30)
    values *= np.uint64(_FIRST)
    values ^= values >> np.uint64(27)
    values *= np.uint64(_SECOND)
    values ^= values >> np.uint64(31)
    return values


def derive_keys(keys: np.ndarray | np.uint64, parts: np.ndarray) -> np.ndarray:
    """Of each key and one more part: the key that `derive_key` makes of all its parts, uint64 (N,)."""
    return hash_array(keys ^ hash_array(parts.astype(np.uint64)))


def rank_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout and the like in one step of one rank: nothing to store, nothing to restore."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shared_seed(seed: int, step: int) -> int:
    """The seed of what all ranks draw alike in one step."""
    # Multiplied by large odd numbers so that (seed, step + 1) and (seed + 1, step) do not collide.
    return (seed * _GAMMA + step * _STEP) % 2**63


def permutation(key: int, size: int) -> np.ndarray:
    """A random permutation of [0, size) as an int64 array: for lists that are short enough to be held."""
    # The hash is a bijection, so no two of the numbers are equal and any sort gives the same answer.
    return np.argsort(hash_array(np.uint64(key) ^ hash_array(np.arange(size, dtype=np.uint64))))


def permute(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where a keyed bijection on [0, size) sends each index, in constant memory per index.

    A Feistel network over the mixed radix a x b, the smallest near-square grid that holds `size` points
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). An image outside [0, size) is sent
    through again until it falls inside ("cycle walking"), which few need: the grid is hardly larger.

    Args:
        indices: int64 (N,), each in [0, size).
        sizes: int64 (N,), from 1 to 2**62.
        keys: uint64 (N,).
    """
    images = _feistel(indices, sizes, keys)
    outside = np.flatnonzero(images >= sizes)
    while outside.size:
        images[outside] = _feistel(images[outside], sizes[outside], keys[outside])
        outside = outside[images[outside] >= sizes[outside]]
    return images


def _feistel(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    rows = np.maximum(np.ceil(np.sqrt(sizes)).astype(np.uint64), _SMALLEST_RADIX)
    columns = np.maximum((sizes.astype(np.uint64) + rows - np.uint64(1)) // rows, _SMALLEST_RADIX)
    left, right = np.divmod(indices.astype(np.uint64), columns)
    left_radix, right_radix = rows, columns
    for number in range(_ROUNDS):
        noise = hash_array(keys + np.uint64(number * _GAMMA & _MASK) + right * np.uint64(_STEP))
        left, right = right, (left + noise % left_radix) % left_radix
        left_radix, right_radix = right_radix, left_radix
    return (left * right_radix + right).astype(np.int64)


class Draws:
    """A stream of uniform numbers from a key."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._count = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """The next number, uniform in [low, high)."""
        self._count += 1
        return low + (high - low) * (hash_int(self._key ^ self._count * _STEP & _MASK) >> 11) * 2.0**-53
