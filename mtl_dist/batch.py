"""The batch: what a loader hands to a model, and the shape legend of the whole package.

Tensors carry a shape suffix where it helps (`logits_BC`, `losses_T`):

    B  samples of a micro-batch        T  tasks
    C  channels or classes             D  features
    H  height                          W  width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

Outputs: TypeAlias = dict[str, Tensor]
"""One tensor per task, as its `HeadSpec` says: (B, C) or (B, C, H, W)."""


@dataclass(frozen=True)
class WholeMaps:
    """A task's maps in their own size, which evaluation measures by.

    values     all of them one after another, flat, of labelled samples alone
    sizes      each sample's (height, width); (0, 0) where there is none
    restored   maps (B, C, h, w) of the batch's view, in the size of an image
    """

    values: Tensor
    sizes: list[tuple[int, int]]
    restored: Callable[[Tensor, tuple[int, int]], Tensor]

    def beside(self, output_BCHW: Tensor, most: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Samples by their rows, their outputs in their maps' size, and the maps (B, H, W).

        So many at a time as are next to one another, of one size, and hold no more than `most` values.
        """
        start = 0
        labelled = [(row, size) for row, size in enumerate(self.sizes) if size != (0, 0)]
        for size, group in groupby(labelled, key=lambda item: item[1]):
            pixels = size[0] * size[1]
            fitting = max(1, most // (pixels * output_BCHW.shape[1]))
            rows = [row for row, _ in group]
            for first in range(0, len(rows), fitting):
                some = rows[first : first + fitting]
                maps_BHW = self.values[start : start + len(some) * pixels].view(len(some), *size)
                start += len(some) * pixels
                yield some, self.restored(output_BCHW[some], size), maps_BHW


@dataclass
class Batch:
    """One micro-batch of one rank.

    images_BCHW   uint8 (float32 for images that are not 8-bit), in channels-last memory
    targets       per task: int64 (B,) class; float32 (B, C) multilabel; float32 (B,) regression, in the
                  dataset's unit; uint8 (B, H, W) mask with 255 = ignore; float32 (B, H, W) numbers or
                  (B, 3, H, W) normals with NaN where there is none. Where a label is missing the target holds
                  a harmless value (0, 255 in a mask, NaN in other maps).
    labelled      per task: bool (B,), true where the sample is real and has the label
    valid_B       bool (B,), false for the samples that only pad a batch
    positions_B   int64 (B,), the global position of each sample in the training stream, or in the split
    keys          the samples' keys
    num_bad       how many of the samples could not be read and were masked (they are not valid)
    lam_B         float32 (B,) where images are blended with others: lambda, how much of its own class each
                  sample is to learn; the rest is of
    partners      per classification task: int64 (B,) the class that was blended in; labelled where its own is
    whole         per task that is measured so: its maps in their own size
    """

    images_BCHW: Tensor
    targets: dict[str, Tensor]
    labelled: dict[str, Tensor]
    valid_B: Tensor
    positions_B: Tensor
    keys: list[str]
    num_bad: int = 0
    lam_B: Tensor | None = None
    partners: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, WholeMaps] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.images_BCHW.shape[0]

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            images_BCHW=move(self.images_BCHW),
            targets={name: move(target) for name, target in self.targets.items()},
            labelled={name: move(mask) for name, mask in self.labelled.items()},
            valid_B=move(self.valid_B),
            positions_B=move(self.positions_B),
            keys=self.keys,
            num_bad=self.num_bad,
            lam_B=None if self.lam_B is None else move(self.lam_B),
            partners={name: move(target) for name, target in self.partners.items()},
            whole={name: replace(maps, values=move(maps.values)) for name, maps in self.whole.items()},
        )

    def tensors(self) -> Iterator[Tensor]:
        """Everything that `to` moves."""
        yield from (self.images_BCHW, self.valid_B, self.positions_B)
        for group in (self.targets, self.labelled, self.partners):
            yield from group.values()
        if self.lam_B is not None:
            yield self.lam_B
        for maps in self.whole.values():
            yield maps.values

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (the DataLoader calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())
