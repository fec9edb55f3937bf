"""Batches copied to a GPU while it still computes on those before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from mtl_dist.batch import Batch


def device_prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, Batch]]:
    """Each batch as it came, beside its copy on `device`; on a GPU the next copy is under way by then.

    The copies are made on a stream of their own, one batch early, from memory that is page-locked if the
    loader was asked for that. Without a GPU there is nothing to copy, and no batch is fetched early.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    upcoming: tuple[Batch, Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = batch.to(device)
            copied = stream.record_event()
        if upcoming is not None:
            yield _handed_over(*upcoming)
        upcoming = batch, copy, copied
    if upcoming is not None:
        yield _handed_over(*upcoming)


def _handed_over(batch: Batch, copy: Batch, copied: torch.cuda.Event) -> tuple[Batch, Batch]:
    """The two, once the stream that computes waits for the copy."""
    current = torch.cuda.current_stream(copy.images_BCHW.device)
    current.wait_event(copied)
    for tensor in copy.tensors():
        # Its memory belongs to the other stream, which would reuse it as soon as the tensor is dropped.
        tensor.record_stream(current)
    return batch, copy
