"""Leakage: images that training, validation and test have in common, over all datasets of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from mtl_dist.data.content_hashes import same_rows
from mtl_dist.data.loader import Data, Source

_LISTED = 3


def leakage(data: Data) -> Iterator[str]:
    """One line for each two sources of different splits that hold the same images, and one about the unknown.

    Raises:
        UserError: the content hashes of a split are missing, or are those of other samples.
    """
    hashes = {
        split: [source.reader.content_hashes() for source in data.sources[split]] for split in data.splits
    }
    unknown = [
        _name(source)
        for split, sources in data.sources.items()
        for source, found in zip(sources, hashes[split], strict=True)
        if found is None
    ]
    for first, second in combinations(data.splits, 2):
        for ours, many in zip(data.sources[first], hashes[first], strict=True):
            for theirs, few in zip(data.sources[second], hashes[second], strict=True):
                if many is None or few is None or (first == "val" and _are_one(ours, theirs)):
                    continue
                in_theirs, in_ours = same_rows(few, many)
                if len(in_theirs):
                    keys = _keys(ours, in_ours, theirs, in_theirs)
                    yield f"the same image in {_name(ours)} and {_name(theirs)}: {len(in_theirs)} ({keys})."
    if unknown and len(data.splits) > 1:
        yield (
            f"whether splits have images in common is not known of {', '.join(unknown)}: prepared "
            "without content hashes. Prepare or index again to know."
        )


def _are_one(val: Source, test: Source) -> bool:
    """Whether a recipe tests on what it validates on, which `Data.describe` says."""
    return (val.facts.path, val.facts.split) == (test.facts.path, test.facts.split)


def _keys(ours: Source, our_rows: np.ndarray, theirs: Source, their_rows: np.ndarray) -> str:
    """The first few pairs of samples, by their keys."""
    pairs = zip(our_rows[:_LISTED].tolist(), their_rows[:_LISTED].tolist(), strict=True)
    listed = "; ".join(f"{ours.reader.key(i)} = {theirs.reader.key(j)}" for i, j in pairs)
    more = len(our_rows) - _LISTED
    return f"{listed} and {more} more" if more > 0 else listed


def _name(source: Source) -> str:
    return f"{source.facts.split} of {source.facts.path.name}"
