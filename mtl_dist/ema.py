"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mtl_dist.engine.engine import Engine


class Ema:
    """average <- decay * average + (1 - decay) * weights, after every optimizer step.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that a short run is not dominated by its
    initial weights. Buffers (BatchNorm's statistics) are not averaged: evaluation uses the current ones.
    Each rank keeps the average of its own shard of the weights, as the engine divides them.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._average = {name: shard.clone() for name, shard in engine.shards().items()}

    def update(self, step: int, finite: Tensor) -> None:
        """Take in the weights after optimizer step number `step` (counted from 1), if it was made."""
        decay = min(self._decay, (1 + step) / (10 + step))
        shards = self._engine.shards()
        averages = list(self._average.values())
        weights = [shards[name] for name in self._average]
        if finite.device.type == "cpu":
            if finite:
                torch._foreach_lerp_(averages, weights, 1 - decay)
            return
        # The host does not know, and need not: the weights are as they were, and 0 times the change is added.
        changes = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(changes, (1 - decay) * finite.float())
        torch._foreach_add_(averages, changes)

    def full(self) -> dict[str, Tensor]:
        """Collective: the whole averaged weights, on the host of rank 0; elsewhere empty."""
        return self._engine.gathered(self._average)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Take over whole averaged weights; every rank passes the same."""
        for name, shard in self._average.items():
            shard.copy_(self._engine.shard_of(name, average[name]))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averaged weights are the model's inside this context."""
        shards = self._engine.shards()
        kept = {name: shard.clone() for name, shard in shards.items()}
        for name, shard in shards.items():
            shard.copy_(self._average[name])
        try:
            yield
        finally:
            for name, shard in shards.items():
                shard.copy_(kept[name])
