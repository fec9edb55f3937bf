"""BatchNorm's running statistics without their initial values.

A layer's running statistics begin at mean 0 and variance 1, and with momentum m every batch moves them by m:
after t batches (1 - m)^t of the initial values is left, of mobilenet_v3 (m = 0.01) a third after 100 steps. A
short run would be evaluated with these. So after step t each statistic is an average in which the newest
batch has the weight

    max(m, 10 / (t + 9))

at first an average over about the last tenth of the steps, and torch's own update from t = 10 / m - 9 on. The
plain mean of all batches, 1 / t, holds on to those that the first, fast steps have made meaningless: it is
worse than no correction (docs/benchmarks.md). A window of k micro-batches counts as one of weight
max(1 - (1 - m)^k, 10 / (t + 9)). The state is `num_batches_tracked`, which checkpoints have. Training does
not read running statistics, so losses and weights stay what they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SPAN = 10
"""The part of the steps so far that an average is over: one in so many."""


@dataclass
class _Layer:
    """A layer with its statistics, momentum, and the batches that it has seen, as known to the host."""

    norm: _BatchNorm
    momentum: float
    count: int
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    """Within a window: mean, variance and count as they were before."""

    @property
    def active(self) -> bool:
        return self.norm.training and self.count < _settled(self.momentum)


def _settled(momentum: float) -> int:
    """The batches after which the weight is torch's."""
    return math.ceil(SPAN / momentum - (SPAN - 1))


class BatchStatistics:
    """Debiases the running statistics of the BatchNorm layers inside `root`, window by window.

    Statistics that came with pretrained weights are kept: those have a count of batches; where a file has
    none, they are given one that leaves the weight to momentum.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.reload()

    @torch.no_grad()
    def reload(self) -> None:
        """Look at the layers again: weights and buffers have been loaded."""
        norms = [m for m in self._root.modules() if isinstance(m, _BatchNorm) and m.momentum]
        norms = [norm for norm in norms if norm.num_batches_tracked is not None]
        self._layers = []
        for norm in norms:
            mean, variance, count = _buffers(norm)
            assert norm.momentum is not None
            if count == 0 and (mean.any() or (variance != 1).any()):
                count.fill_(_settled(norm.momentum))
            self._layers.append(_Layer(norm, norm.momentum, int(count)))

    @torch.no_grad()
    def begin(self) -> None:
        """Before a window's first forward: what it adds to the statistics is kept apart."""
        for layer in self._layers:
            if layer.active:
                mean, variance, count = _buffers(layer.norm)
                layer.kept = (mean.clone(), variance.clone(), count.clone())
                mean.zero_()
                variance.zero_()

    @torch.no_grad()
    def finish(self, num_micro_batches: int) -> None:
        """After the window, whose statistics are averaged over the ranks: bring old and new together."""
        for layer in self._layers:
            if layer.kept is not None:
                mean, variance, count = _buffers(layer.norm)
                *before, count_before = layer.kept
                seen = count - count_before
                # On the device: the host never waits. A layer that did not run keeps what it had.
                by_momentum = 1 - (1 - layer.momentum) ** seen.double()
                by_steps = SPAN * seen.double() / (count + (SPAN - 1) * seen).clamp(min=1)
                weight = torch.maximum(by_momentum, by_steps)
                for statistic, old in zip((mean, variance), before, strict=True):
                    new = statistic.double() / by_momentum
                    merged = old + weight * (new - old)
                    statistic.copy_(torch.where(seen > 0, merged, old.double()))
                layer.kept = None
            if layer.norm.training:
                layer.count += num_micro_batches


def _buffers(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Read again each time: an engine may have put others in their place."""
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert count is not None
    return mean, variance, count
