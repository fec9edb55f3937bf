"""Whole weights between two steps: evaluation and averages of the weights, under engines that divide them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mtl_dist.engine.engine import FullState
from tests.ranks import shared_pool
from tests.tiny_training import (
    NUM_INPUTS,
    EngineName,
    Setup,
    TinyRoot,
    build_engine,
    build_root,
    reference,
    train_step,
)

pytestmark = pytest.mark.slow

RUNS: list[tuple[EngineName, int]] = [("single", 1), ("ddp", 2), ("zero1", 2), ("zero3", 2), ("zero3", 1)]
"""Engines and numbers of ranks."""

DECAY = 0.5
SETUP = Setup(labels="sometimes_absent", batch_norm=False, last_step=4)


@dataclass
class Seen:
    """What one rank saw half-way, and the end of the training; host tensors."""

    predictions: dict[str, Tensor]
    averaged_predictions: dict[str, Tensor]
    average: dict[str, Tensor]
    middle: FullState
    end: FullState


def images() -> Tensor:
    return torch.randn(5, NUM_INPUTS, generator=torch.Generator().manual_seed(3))


def predict(root: TinyRoot) -> dict[str, Tensor]:
    root.eval()
    with torch.no_grad():
        predictions = root.predict(images())
    root.train()
    return predictions


def train_and_look(setup: Setup) -> Seen:
    """Train with an average of the weights, and evaluate both after the second of four steps."""
    engine, root = build_engine(setup)
    average = {name: shard.clone() for name, shard in engine.shards().items()}
    for step in range(2):
        train_step(engine, root, setup, step)
        for name, shard in engine.shards().items():
            average[name].lerp_(shard, 1 - DECAY)
    with engine.evaluating():
        predictions = predict(root)
    kept = {name: shard.clone() for name, shard in engine.shards().items()}
    for name, shard in engine.shards().items():
        shard.copy_(average[name])
    with engine.evaluating():
        averaged_predictions = predict(root)
    for name, shard in engine.shards().items():
        shard.copy_(kept[name])
    whole_average = engine.gathered(average)
    middle = engine.full_state()
    everywhere = engine.world.broadcast(whole_average)
    shards_again = {name: engine.shard_of(name, whole) for name, whole in everywhere.items()}
    for name, whole in engine.gathered(shards_again).items():
        assert torch.equal(whole, whole_average[name])
    for step in range(2, setup.last_step):
        train_step(engine, root, setup, step)
    return Seen(predictions, averaged_predictions, whole_average, middle, engine.full_state())


@pytest.mark.parametrize(("engine", "size"), RUNS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_rank_evaluates_whole_weights_and_training_goes_on(
    engine: EngineName, size: int, precision: str
) -> None:
    setup = SETUP.with_(engine=engine, precision=precision)
    ranks = shared_pool(size).run(train_and_look, setup)
    root = build_root(setup)
    root.load_state_dict(ranks[0].middle.model)
    for seen in ranks:
        for name, expected in predict(root).items():
            torch.testing.assert_close(seen.predictions[name], expected, rtol=1e-6, atol=1e-6)
    if precision == "fp32":
        for name, weight in reference(SETUP).state.model.items():
            torch.testing.assert_close(ranks[0].end.model[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("small_weight", [50, 100_000])
def test_weights_that_stay_whole_are_never_old(small_weight: int) -> None:
    setup = SETUP.with_(engine="zero3")
    every_weight_divided = shared_pool(2).run(train_and_look, setup)[0]
    some_whole = shared_pool(2).run(train_and_look, setup.with_(small_weight=small_weight))[0]
    for seen in ("predictions", "averaged_predictions", "average"):
        for name, expected in getattr(every_weight_divided, seen).items():
            torch.testing.assert_close(getattr(some_whole, seen)[name], expected, rtol=1e-6, atol=1e-6)
    for name, weight in every_weight_divided.end.model.items():
        torch.testing.assert_close(some_whole.end.model[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("engine", "size"), RUNS)
def test_an_average_of_the_shares_is_the_average_of_the_weights(engine: EngineName, size: int) -> None:
    ranks = shared_pool(size).run(train_and_look, SETUP.with_(engine=engine))
    first, second = reference(SETUP.with_(every_state=True)).states[:2]
    average = {name: w for name, w in build_root(SETUP).named_parameters()}
    for state in (first, second):
        average = {name: torch.lerp(w, state.model[name], 1 - DECAY) for name, w in average.items()}
    assert ranks[0].average.keys() == average.keys()
    for name, expected in average.items():
        torch.testing.assert_close(ranks[0].average[name], expected.detach(), rtol=1e-5, atol=1e-6)
    root = build_root(SETUP)
    root.load_state_dict(ranks[0].middle.model | ranks[0].average)
    for seen in ranks:
        for name, expected in predict(root).items():
            torch.testing.assert_close(seen.averaged_predictions[name], expected, rtol=1e-6, atol=1e-6)
