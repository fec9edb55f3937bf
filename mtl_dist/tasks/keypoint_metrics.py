"""The metrics of points, from float64 sums and counts over the labelled points of a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mtl_dist.tasks.accumulator import Accumulator

Reference = Literal["diagonal", "extent"] | tuple[str, str]


class KeypointMetrics(Accumulator):
    """Distances between points in pixels of the images as they came, over all labelled points of the split.

    pixel_error is their mean. nme is the mean of the distances over the reference length of their image, pck
    the share of them that are at most `alpha` of it; both are over the points of images that have a reference
    length: none where it is 0, or where one of the two points that it is between has no label.
    """

    sums: Tensor
    counts: Tensor
    num_samples: Tensor

    def __init__(
        self, read: Callable[[Tensor], Tensor], names: Sequence[str], reference: Reference, alpha: float
    ) -> None:
        super().__init__()
        self._read = read
        self._pair = [names.index(name) for name in reference] if isinstance(reference, tuple) else []
        self._reference = reference
        self._alpha = alpha
        self.add_sum("sums", torch.zeros(2, len(names), dtype=torch.float64))
        self.add_sum("counts", torch.zeros(3, len(names), dtype=torch.int64))
        self.add_sum("num_samples", torch.zeros((), dtype=torch.int64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count outputs against targets (B, K + 3, 3)."""
        there_BK = (target[:, :-3, 2] > 0) & labelled_B[:, None]
        apart_BK = errors(self._read(output), target)
        lengths_B = self._lengths(target.double(), there_BK)
        measured_BK = there_BK & (lengths_B > 0)[:, None]
        shares_BK = apart_BK / torch.where(lengths_B > 0, lengths_B, 1.0)[:, None]
        right_BK = measured_BK & (shares_BK <= self._alpha)
        self.sums += torch.stack(
            [
                torch.where(there_BK, apart_BK, 0.0).sum(dim=0),
                torch.where(measured_BK, shares_BK, 0.0).sum(dim=0),
            ]
        )
        self.counts += torch.stack([there_BK.sum(dim=0), measured_BK.sum(dim=0), right_BK.sum(dim=0)])
        self.num_samples += labelled_B.sum()

    def metrics(self) -> dict[str, float]:
        names = ("nme", "pck", "pixel_error")
        per_point = zip(self.sums.T.tolist(), self.counts.T.tolist(), strict=True)
        self._per_class = [
            dict(zip(names, _quotients(sums, counts), strict=True)) | {"support": float(counts[0])}
            for sums, counts in per_point
        ]
        all_together = _quotients(self.sums.sum(dim=1).tolist(), self.counts.sum(dim=1).tolist())
        return dict(zip(names, all_together, strict=True)) | {"num_samples": float(self.num_samples)}

    def _lengths(self, target: Tensor, there_BK: Tensor) -> Tensor:
        """The reference length of each image, in its pixels; 0 where there is none."""
        if self._reference == "diagonal":
            return target[:, -1, :2].square().sum(dim=1).sqrt()
        places_BK2 = in_image(target[:, :-3, :2], target)
        if self._pair:
            one, other = self._pair
            lengths_B = (places_BK2[:, one] - places_BK2[:, other]).square().sum(dim=1).sqrt()
            return torch.where(there_BK[:, one] & there_BK[:, other], lengths_B, 0.0)
        low = torch.where(there_BK[..., None], places_BK2, math.inf).amin(dim=1)
        high = torch.where(there_BK[..., None], places_BK2, -math.inf).amax(dim=1)
        return (high - low).amax(dim=1).clamp(min=0)


def in_image(points_BK2: Tensor, target: Tensor) -> Tensor:
    """Points of views in pixels of their images, float64 (B, K, 2)."""
    to_image = target[:, -3:-1].double()
    return points_BK2.double() @ to_image[..., :2].mT + to_image[:, None, :, 2]


def errors(points_BK2: Tensor, target: Tensor) -> Tensor:
    """The distance of points from those of the targets, in pixels of their images: float64 (B, K)."""
    apart = in_image(points_BK2, target) - in_image(target[:, :-3, :2], target)
    return apart.square().sum(dim=2).sqrt()


def _quotients(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float, float]:
    num, measured, right = counts
    return _ratio(sums[1], measured), _ratio(right, measured), _ratio(sums[0], num)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
