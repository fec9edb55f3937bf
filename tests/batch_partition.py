"""Global batches, divided as the loader divides them."""

from __future__ import annotations

from dataclasses import replace

from mtl_dist.batch import Batch


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Parts of equal size, in order."""
    size = len(batch) // parts
    return [_rows(batch, slice(number * size, (number + 1) * size)) for number in range(parts)]


def micro_batches(batch: Batch, rank: int, num_ranks: int, accumulation: int) -> list[Batch]:
    """A rank's window of a global batch."""
    return cut(batch, num_ranks * accumulation)[rank * accumulation : (rank + 1) * accumulation]


def _rows(batch: Batch, rows: slice) -> Batch:
    return replace(
        batch,
        images_BCHW=batch.images_BCHW[rows],
        targets={name: target[rows] for name, target in batch.targets.items()},
        labelled={name: mask[rows] for name, mask in batch.labelled.items()},
        valid_B=batch.valid_B[rows],
        positions_B=batch.positions_B[rows],
        keys=batch.keys[rows],
    )
