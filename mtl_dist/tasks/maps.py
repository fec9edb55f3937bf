"""Reading a segmentation head's output, whether it has one output for two classes or one for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtl_dist.lazy import F, torch
from mtl_dist.tasks.thresholds import log_odds

if TYPE_CHECKING:
    from torch import Tensor


def resized(logits_BCHW: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """The logits at (height, width) as float32; bilinear where they are at another."""
    logits_BCHW = logits_BCHW.float()
    if tuple(logits_BCHW.shape[-2:]) == tuple(size):
        return logits_BCHW
    return F.interpolate(logits_BCHW, size=size, mode="bilinear", align_corners=False)


def foreground_logits(logits_BCHW: Tensor) -> Tensor:
    """The log-odds (B, H, W) of class 1 against class 0, from one output or from two."""
    if logits_BCHW.shape[1] == 1:
        return logits_BCHW[:, 0]
    return logits_BCHW[:, 1] - logits_BCHW[:, 0]


def predicted_classes(logits_BCHW: Tensor, threshold: float = 0.5) -> Tensor:
    """The class of each pixel, int64 (B, H, W).

    Of two classes the foreground wherever its probability exceeds `threshold`; of more the likeliest.
    """
    if logits_BCHW.shape[1] > 2:
        # The same as argmax, which takes nine times as long over a CPU's strided channels.
        return logits_BCHW.max(dim=1).indices
    # Compared as log-odds: probabilities next to 0.5 round to it.
    return (foreground_logits(logits_BCHW) > log_odds(threshold)).long()
