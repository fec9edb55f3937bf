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


@dataclass(eq=False)
class _Layer:
    """A layer, its momentum, and the batches that it has seen, as known to the host."""

    norm: _BatchNorm
    momentum: float
    count: int

    @property
    def active(self) -> bool:
        return self.norm.training and self.count < _settled(self.momentum)


def _settled(momentum: float) -> int:
    """The batches after which the weight is torch's."""
    return math.ceil(SPAN / momentum - (SPAN - 1))


class _Active:
    """The layers that are debiased, as one: a kernel for all where each would take a dozen."""

    def __init__(self, layers: list[_Layer]) -> None:
        self.layers = layers
        statistics, counts_L = self.read()
        device = counts_L.device
        self._sizes = [statistic.numel() for statistic in statistics]
        # On the device once, not at every step: the host would wait for the copy.
        of_N = torch.arange(len(layers)).repeat(2).repeat_interleave(torch.tensor(self._sizes))
        self._layer_of_N = of_N.to(device)
        self._momentum_L = torch.tensor([layer.momentum for layer in layers], dtype=torch.float64).to(device)

    def read(self) -> tuple[list[Tensor], Tensor]:
        """Every layer's running mean, then every layer's variance; and their counts (L,), a copy.

        Read again each time: an engine may have put others in their place.
        """
        buffers = [_buffers(layer.norm) for layer in self.layers]
        means, variances, counts = zip(*buffers, strict=True)
        return [*means, *variances], torch.stack(counts)

    def set_apart(self) -> None:
        """Keep what the statistics are, and begin them at zero."""
        statistics, self._counts_before_L = self.read()
        self._before_N = torch.cat(statistics).double()
        torch._foreach_zero_(statistics)

    def merge(self) -> None:
        """Bring what was kept and what came since together."""
        statistics, counts_L = self.read()
        seen_L = counts_L - self._counts_before_L
        # On the device: the host never waits. A layer that did not run keeps what it had.
        by_momentum_L = 1 - (1 - self._momentum_L) ** seen_L.double()
        by_steps_L = SPAN * seen_L.double() / (counts_L + (SPAN - 1) * seen_L).clamp(min=1)
        weight_L = torch.maximum(by_momentum_L, by_steps_L)
        of_N, old_N = self._layer_of_N, self._before_N
        new_N = torch.cat(statistics).double() / by_momentum_L[of_N]
        merged_N = torch.where((seen_L > 0)[of_N], old_N + weight_L[of_N] * (new_N - old_N), old_N)
        torch._foreach_copy_(statistics, list(merged_N.split(self._sizes)))


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
        self._active: _Active | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Before a window's first forward: what it adds to the statistics is kept apart."""
        layers = [layer for layer in self._layers if layer.active]
        if self._active is None or self._active.layers != layers:
            self._active = _Active(layers) if layers else None
        if self._active is not None:
            self._active.set_apart()

    @torch.no_grad()
    def finish(self, num_micro_batches: int) -> None:
        """After the window, whose statistics are averaged over the ranks: bring old and new together."""
        if self._active is not None:
            self._active.merge()
        for layer in self._layers:
            if layer.norm.training:
                layer.count += num_micro_batches


def _buffers(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert count is not None
    return mean, variance, count
