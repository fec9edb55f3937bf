"""The metrics of maps of numbers and of directions: float64 sums and counts over the pixels of a split."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.accumulator import Accumulator
from mtl_dist.tasks.maps import resized

BINS_PER_DEGREE = 100
_DELTA = 1.25
_WITHIN = (11.25, 22.5, 30.0)


class DepthMetrics(Accumulator):
    """Errors of maps of numbers over all pixels of the split that have a value.

    mae, rmse and r2 in the unit; abs_rel, sq_rel, rmse_log, log10, delta1 to delta3 and silog over the pixels
    whose value is positive, where what is predicted below the smallest positive training value counts as that
    (a logarithm wants positive numbers). silog is 100 sqrt(mean(d^2) - mean(d)^2) of an image's logarithms,
    averaged over the images, as KITTI has it.
    """

    sums: Tensor

    def __init__(self, read: Callable[[Tensor], Tensor], info: TaskInfo) -> None:
        super().__init__()
        self._read = read
        self._floor = info.minimum if info.minimum > 0 else 1e-6
        self._mean = info.mean
        self.add_sum("sums", torch.zeros(16, dtype=torch.float64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count outputs (B, 1, h, w) against values (B, H, W) in their unit."""
        predicted = self._read(resized(output, target.shape[-2:]))
        valid = torch.isfinite(target) & labelled_B[:, None, None]
        true = torch.where(valid, target, 0.0).double()
        error = torch.where(valid, predicted - true, 0.0)
        centred = torch.where(valid, true - self._mean, 0.0)
        positive = valid & (true > 0)
        safe_true = torch.where(positive, true, 1.0)
        safe = torch.where(positive, predicted.clamp(min=self._floor), 1.0)
        relative = (safe - safe_true) / safe_true
        logs = safe.log() - safe_true.log()
        ratio = torch.where(positive, logs.abs().exp(), math.inf)
        num_B = positive.sum(dim=(1, 2))
        safe_B = num_B.clamp(min=1)
        variance_B = logs.square().sum(dim=(1, 2)) / safe_B - (logs.sum(dim=(1, 2)) / safe_B).square()
        self.sums += torch.stack(
            [
                labelled_B.sum().double(),
                valid.sum().double(),
                error.abs().sum(),
                error.square().sum(),
                centred.sum(),
                centred.square().sum(),
                num_B.sum().double(),
                relative.abs().sum(),
                (relative * (safe - safe_true)).sum(),
                logs.square().sum(),
                logs.abs().sum(),
                *((ratio < _DELTA**power).sum().double() for power in (1, 2, 3)),
                (num_B > 0).sum().double(),
                variance_B.clamp(min=0).sqrt().sum(),
            ]
        )

    def metrics(self) -> dict[str, float]:
        samples, num, absolute, squared, total, deviation, positive, *rest = self.sums.tolist()
        relative, squared_relative, squared_log, absolute_log, *within, images, silog = rest
        spread = deviation - total * total / num if num else 0.0
        return {
            "mae": _ratio(absolute, num),
            "rmse": math.sqrt(_ratio(squared, num)),
            "r2": 1 - squared / spread if spread > 1e-12 * deviation else math.nan,
            "abs_rel": _ratio(relative, positive),
            "sq_rel": _ratio(squared_relative, positive),
            "rmse_log": math.sqrt(_ratio(squared_log, positive)),
            "log10": _ratio(absolute_log, positive) / math.log(10),
            "silog": 100 * _ratio(silog, images),
            "delta1": _ratio(within[0], positive),
            "delta2": _ratio(within[1], positive),
            "delta3": _ratio(within[2], positive),
            "num_samples": samples,
        }


class NormalsMetrics(Accumulator):
    """Angles between directions, in degrees, over all pixels of the split that have one.

    median_angle is that of all of them, to a hundredth of a degree: it is interpolated within a bin of a
    histogram. within_11_25 and its kin are the shares of angles below 11.25, 22.5 and 30 degrees.
    """

    sums: Tensor
    histogram: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("sums", torch.zeros(3 + len(_WITHIN), dtype=torch.float64))
        self.add_sum("histogram", torch.zeros(180 * BINS_PER_DEGREE + 2, dtype=torch.int64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count vectors (B, 3, h, w) of any length against unit vectors (B, 3, H, W)."""
        valid = torch.isfinite(target).all(dim=1) & labelled_B[:, None, None]
        true = torch.where(valid[:, None], target, 1.0).double()
        vectors = F.normalize(resized(output.detach(), target.shape[-2:]), dim=1, eps=1e-6).double()
        # Not by the arccosine, which loses half of its digits next to 0.
        cross = torch.linalg.cross(vectors, true, dim=1).square().sum(dim=1).sqrt()
        angles = torch.rad2deg(torch.atan2(cross, (vectors * true).sum(dim=1)))
        self.sums += torch.stack(
            [
                labelled_B.sum().double(),
                valid.sum().double(),
                torch.where(valid, angles, 0.0).sum(),
                *((valid & (angles < limit)).sum().double() for limit in _WITHIN),
            ]
        )
        last = len(self.histogram) - 1  # of pixels without a direction
        bins = torch.where(valid, (angles * BINS_PER_DEGREE).long().clamp(max=last - 1), last).flatten()
        self.histogram.scatter_add_(0, bins, bins.new_ones(1).expand(len(bins)))

    def metrics(self) -> dict[str, float]:
        samples, num, total, *within = self.sums.tolist()
        names = ("within_11_25", "within_22_5", "within_30")
        return {
            "mean_angle": _ratio(total, num),
            "median_angle": self._median(),
            **{name: _ratio(part, num) for name, part in zip(names, within, strict=True)},
            "num_samples": samples,
        }

    def _median(self) -> float:
        counts = self.histogram[:-1].cumsum(dim=0)
        half = float(counts[-1]) / 2
        if not half:
            return math.nan
        at = int((counts < half).sum())
        before = float(counts[at - 1]) if at else 0.0
        return (at + (half - before) / (float(counts[at]) - before)) / BINS_PER_DEGREE


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
