"""A checkpoint fits any engine: train under one on n ranks, go on under another on m ranks."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from mtl_dist.engine.engine import FullState
from tests.ranks import shared_pool
from tests.tiny_training import (
    EngineName,
    Result,
    Setup,
    build_engine,
    problem_of,
    reference,
    train,
    train_all,
    train_step,
)

pytestmark = pytest.mark.slow

RUNS: list[tuple[EngineName, int]] = [
    ("single", 1),
    ("ddp", 2),
    ("zero1", 1),
    ("zero1", 2),
    ("zero2", 1),
    ("zero2", 2),
    ("zero3", 1),
    ("zero3", 2),
]
"""Engines and numbers of ranks."""

WHOLE = Setup(labels="sometimes_absent", clip_norm=0.5, last_step=5)
"""gamma has labels in steps 1 and 4 alone: the heads' step counters differ in a checkpoint."""
MIDDLE = 3


def state_with_odd_padding(setup: Setup) -> FullState:
    """After a step, what fills up the last shards being no number."""
    engine, root = build_engine(setup)
    train_step(engine, root, setup, 0)
    rank = engine.world.rank
    for parameter in root.parameters():
        part: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        own = max(min(part, parameter.ds_numel - rank * part), 0)  # type: ignore[attr-defined]
        parameter.ds_tensor.data.view(-1)[own:] = float("nan")  # type: ignore[attr-defined]
    return engine.full_state()


def test_what_fills_up_a_shard_is_no_weight() -> None:
    setup = Setup(engine="zero3", last_step=1)
    found = shared_pool(2).run(state_with_odd_padding, setup)[0]
    expected = plain(setup.with_(engine="single")).state
    for name, tensor in expected.model.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=1e-5, atol=1e-6)


@cache
def plain(setup: Setup) -> Result:
    return reference(setup)


@cache
def half_way(engine: EngineName, size: int) -> FullState:
    result = shared_pool(size).run(train, WHOLE.with_(engine=engine, last_step=MIDDLE))[0]
    assert result.state.optimizer["step/heads.alpha.weight"] == 3
    assert result.state.optimizer["step/heads.gamma.0.weight"] == 1
    return result.state


@pytest.mark.parametrize(("engine", "size"), RUNS)
def test_any_engine_goes_on_from_any_other_as_if_nothing_had_changed(engine: EngineName, size: int) -> None:
    cases = [WHOLE.with_(engine=engine, first_step=MIDDLE, resume_from=half_way(*before)) for before in RUNS]
    expected = plain(WHOLE)
    for before, found in zip(RUNS, shared_pool(size).run(train_all, cases)[0], strict=True):
        assert found.losses == pytest.approx(expected.losses[MIDDLE:], rel=1e-5), before
        for name, weight in expected.state.model.items():
            torch.testing.assert_close(found.state.model[name], weight, rtol=1e-5, atol=1e-6)
        counters = {
            key: int(value) for key, value in found.state.optimizer.items() if key.startswith("step/")
        }
        assert counters == {
            key: int(value) for key, value in expected.state.optimizer.items() if key.startswith("step/")
        }


@pytest.mark.parametrize(("engine", "size"), RUNS)
def test_the_same_engine_on_the_same_ranks_goes_on_bit_for_bit(engine: EngineName, size: int) -> None:
    case = WHOLE.with_(engine=engine, accumulation=2)
    never_stopped, before = shared_pool(size).run(train_all, [case, case.with_(last_step=MIDDLE)])[0]
    resumed = shared_pool(size).run(train, case.with_(first_step=MIDDLE, resume_from=before.state))[0]
    assert resumed.losses == never_stopped.losses[MIDDLE:]
    assert resumed.state.model.keys() == never_stopped.state.model.keys()
    assert resumed.state.optimizer.keys() == never_stopped.state.optimizer.keys()
    for kind in ("model", "optimizer"):
        old, new = getattr(never_stopped.state, kind), getattr(resumed.state, kind)
        assert all(torch.equal(new[key], value) for key, value in old.items())


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_an_optimizer_on_the_host_goes_on_from_one_process(engine: EngineName) -> None:
    case = WHOLE.with_(
        engine=engine,
        first_step=MIDDLE,
        resume_from=half_way("single", 1),
        offload_optimizer=True,
        offload_parameters=engine == "zero3",
    )
    found, expected = shared_pool(2).run(train, case)[0], plain(WHOLE)
    assert found.losses == pytest.approx(expected.losses[MIDDLE:], rel=1e-5)
    for name, weight in expected.state.model.items():
        torch.testing.assert_close(found.state.model[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_the_loss_scale_goes_on_as_well(engine: EngineName) -> None:
    case = Setup(engine=engine, precision="fp16", explode_at=(1,))
    never_stopped, before = shared_pool(2).run(train_all, [case, case.with_(last_step=MIDDLE)])[0]
    assert before.state.scaler["num_skipped"] >= 1
    resumed = shared_pool(2).run(train, case.with_(first_step=MIDDLE, resume_from=before.state))[0]
    assert resumed.state.scaler == never_stopped.state.scaler
    assert resumed.losses == never_stopped.losses[MIDDLE:]


def test_counters_that_zero_cannot_keep_apart_are_refused() -> None:
    state = half_way("single", 1)
    optimizer = dict(state.optimizer) | {"step/heads.alpha.bias": torch.tensor(2.0)}
    uneven = FullState(state.model, optimizer)
    message = shared_pool(1).run(
        problem_of, WHOLE.with_(engine="zero2", first_step=MIDDLE, resume_from=uneven)
    )[0]
    assert "equally many optimizer steps of heads.alpha.weight, heads.alpha.bias" in message


@pytest.mark.parametrize("engine", ["single", "zero1", "zero3"])
def test_a_checkpoint_of_another_model_is_refused(engine: EngineName) -> None:
    state = half_way("single", 1)
    other = FullState({name: w for name, w in state.model.items() if "gamma" not in name}, {})
    message = shared_pool(1).run(
        problem_of, WHOLE.with_(engine=engine, first_step=MIDDLE, resume_from=other)
    )[0]
    assert "expected the weights of this model, found other ones (heads.gamma.0.bias, " in message
