"""Rules for BatchNorm's running statistics beside one another, evaluated along the same trainings.

Training does not read running statistics, so one training serves all rules: the statistics of each step's
batch are written down, every rule averages them its own way, and at some steps the model is evaluated with
each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.tables import Findings, Row
from mtl_dist.assemble import build_root, facts_of
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.data.loader import Data, eval_loader, open_data, train_loader
from mtl_dist.engine.accelerated import AccelerateEngine, connect_accelerate
from mtl_dist.engine.world import World
from mtl_dist.evaluator import evaluate
from mtl_dist.optim import build_optimizer, learning_rate_factor, set_learning_rate
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.step import RootModule, WindowTotals, count_labels

Rule: TypeAlias = Callable[[int, float], float]
"""The weight of the newest batch after step t of a layer with momentum m."""
Statistics: TypeAlias = list[Tensor]
"""Mean and variance of each layer, one after the other."""

RULES: Mapping[str, Rule] = {
    "m": lambda t, m: m,
    "max(m, 1/t)": lambda t, m: max(m, 1 / t),
    "m / (1 - (1-m)^t)": lambda t, m: m / (1 - (1 - m) ** t),
    "max(m, 2/(t+1))": lambda t, m: max(m, 2 / (t + 1)),
    "max(m, 5/(t+4))": lambda t, m: max(m, 5 / (t + 4)),
    "max(m, 10/(t+9))": lambda t, m: max(m, 10 / (t + 9)),
    "max(m, 0.1, 1/t)": lambda t, m: max(m, 0.1, 1 / t),
}
RECOMPUTED = "recomputed, 16 batches"
_RECOMPUTED_OVER = 16


def bench_batch_norm(recipe: Path, overrides: Sequence[str], steps: Sequence[int], seeds: int) -> Findings:
    """The loss and the first task's metrics on val at each of `steps`: medians over `seeds`."""
    values: dict[tuple[int, str], list[dict[str, float]]] = {}
    for seed in range(seeds):
        for at, rule, metrics in _train(load_recipe(recipe, [*overrides, f"train.seed={seed}"]), steps):
            values.setdefault((at, rule), []).append(metrics)
    rows: list[Row] = []
    for (at, rule), found in values.items():
        row: dict[str, str | float] = {"steps": str(at), "weight of the newest batch": rule}
        for name in found[0]:
            ordered = sorted(metrics[name] for metrics in found)
            row[name] = f"{statistics.median(ordered):.3f} ({ordered[0]:.3f} to {ordered[-1]:.3f})"
        rows.append(row)
    return Findings(f"Median (smallest to largest) of {seeds} seeds", rows)


def _train(recipe: Recipe, steps: Sequence[int]) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Train to the last of `steps`; at each, what every rule leads to."""
    _, world = connect_accelerate()
    data = open_data(recipe.data, recipe.tasks)
    torch.manual_seed(recipe.train.seed)
    root = build_root(recipe, facts_of(data), world)
    optimizer = build_optimizer(recipe.optim, root.model, list(root.tasks), list(root.balancer.parameters()))
    engine = AccelerateEngine(None, world, root, optimizer)
    balancing = Balancing(root, engine, recipe.train.seed)
    layers = [module for module in root.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum or 0.0 for layer in layers for _ in range(2)]
    of_rules = {rule: [tensor.clone() for tensor in _statistics(layers)] for rule in RULES}
    batches = _batches(recipe, data, steps[-1])
    for t, batch in enumerate(batches, start=1):
        set_learning_rate(optimizer, learning_rate_factor(recipe.optim, t - 1, steps[-1], 0, 1.0))
        totals = WindowTotals(count_labels(root.tasks, [batch]), 1, t - 1)
        root.train()
        with _as_they_come(layers):
            engine.forward_backward(batch, totals, balancing.solve([batch], totals), last=True)
        engine.step(root.absent_parameters(totals), recipe.optim.clip_norm)
        new = [tensor.clone() for tensor in _statistics(layers)]
        for rule, kept in of_rules.items():
            for momentum, old, newest in zip(momenta, kept, new, strict=True):
                old.lerp_(newest, RULES[rule](t, momentum))
        if t in steps:
            for rule, kept in of_rules.items():
                yield t, rule, _metrics(root, layers, kept, data, recipe, world)
            yield (
                t,
                RECOMPUTED,
                _metrics(root, layers, _recomputed(root, layers, recipe, data), data, recipe, world),
            )


def _batches(recipe: Recipe, data: Data, number: int) -> Iterator[Batch]:
    size = recipe.train.global_batch
    loader = train_loader(
        data,
        seed=recipe.train.seed,
        global_batch=size,
        accumulation=1,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=number * size,
        workers=recipe.data.workers,
        pin_memory=False,
    )
    return islice(loader, number)


def _statistics(layers: Sequence[nn.Module]) -> Statistics:
    return [getattr(layer, name) for layer in layers for name in ("running_mean", "running_var")]


@contextmanager
def _as_they_come(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within, running statistics are those of the newest batch."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@torch.no_grad()
def _recomputed(root: RootModule, layers: Sequence[_BatchNorm], recipe: Recipe, data: Data) -> Statistics:
    """The mean over some training batches, with the weights as they are."""
    root.train()
    sums: Statistics = []
    with _as_they_come(layers):
        for batch in _batches(recipe, data, _RECOMPUTED_OVER):
            root.predict(batch.images_BCHW)
            found = [tensor.clone() for tensor in _statistics(layers)]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    return [total / _RECOMPUTED_OVER for total in sums]


def _metrics(
    root: RootModule,
    layers: Sequence[_BatchNorm],
    used: Statistics,
    data: Data,
    recipe: Recipe,
    world: World,
) -> dict[str, float]:
    for tensor, value in zip(_statistics(layers), used, strict=True):
        tensor.copy_(value)
    loader = eval_loader(data, "val", batch_size=64, rank=0, world_size=1, workers=recipe.data.workers)
    evaluation = evaluate(root, loader, world)
    metrics = {"val/loss": evaluation.loss}
    for name, task in root.tasks.items():
        metrics |= {
            f"{name}/{metric}": evaluation.tasks[name][metric] for metric in task.settings.compared[:2]
        }
    return metrics
