"""One recipe, any engine, the same numbers: engines on one and two ranks against a plain PyTorch loop."""

from __future__ import annotations

import json
from functools import cache
from itertools import product

import pytest
import torch

from mtl_dist.engine.deepspeed_keys import KEYS, problems
from mtl_dist.engine.deepspeed_setup import import_deepspeed
from mtl_dist.engine.engine import FullState
from tests.ranks import shared_pool
from tests.tiny_training import (
    EngineName,
    Result,
    Setup,
    build_root,
    reference,
    train,
    train_all,
)

pytestmark = pytest.mark.slow

TWO_RANKS: tuple[EngineName, ...] = ("ddp", "zero0", "zero1", "zero2", "zero3")
RUNS: list[tuple[EngineName, int]] = [
    ("single", 1),
    *((engine, 2) for engine in TWO_RANKS),
    ("zero2", 1),
    ("zero3", 1),
]
"""Engines and numbers of ranks."""


@cache
def plain(setup: Setup) -> Result:
    return reference(setup)


def assert_same_model(found: FullState, expected: FullState) -> None:
    assert found.model.keys() == expected.model.keys()
    for name, tensor in expected.model.items():
        torch.testing.assert_close(
            found.model[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
        )


def assert_same_optimizer(found: FullState, expected: FullState) -> None:
    assert found.optimizer.keys() == expected.optimizer.keys()
    for key, tensor in expected.optimizer.items():
        if key.startswith("step/"):
            assert float(found.optimizer[key]) == float(tensor), key
        else:
            scale = float(tensor.abs().max())
            torch.testing.assert_close(
                found.optimizer[key], tensor, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, k=key: k + m
            )


@pytest.mark.parametrize(("engine", "size"), RUNS)
def test_losses_weights_and_optimizer_state_are_those_of_a_plain_loop(engine: EngineName, size: int) -> None:
    adamw = Setup(engine=engine, clip_norm=0.5, last_step=4)
    sgd = adamw.with_(optimizer="sgd")
    cases = [
        adamw.with_(labels=labels, accumulation=accumulation)
        for labels, accumulation in product(("all", "third_missing", "disjoint"), (1, 2))
    ]
    cases += [adamw.with_(labels="sometimes_absent"), sgd.with_(labels="sometimes_absent", accumulation=2)]
    results = shared_pool(size).run(train_all, cases)
    for case, first, *others in zip(cases, *results, strict=True):
        expected = plain(case.with_(engine="single", accumulation=1))
        assert first.losses == pytest.approx(expected.losses, rel=1e-5), case
        assert first.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5), case
        assert_same_model(first.state, expected.state)
        assert_same_optimizer(first.state, expected.state)
        for other in others:
            assert other.losses == first.losses
            assert other.state.model == {} and other.state.optimizer == {}


PASSED = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "communication_data_type": "fp32",
    "comms_logger": {"enabled": False},
    "flops_profiler": {"enabled": False},
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "steps_per_print": 1000,
    "dump_state": False,
}
OF_ZERO = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 50,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 50,
    "overlap_comm": True,
    "ignore_unused_parameters": False,
}
OF_ZERO_3 = {
    "sub_group_size": 100,
    "memory_efficient_linear": False,
    "enable_sanity_checks": True,
    "stage3_prefetch_bucket_size": 10,
    "stage3_param_persistence_threshold": 20,
    "stage3_model_persistence_threshold": 200,
    "stage3_max_live_parameters": 300,
    "stage3_max_reuse_distance": 100,
    "stage3_use_all_reduce_for_fetch_params": True,
}


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_what_is_passed_on_to_deepspeed_changes_no_number(engine: EngineName) -> None:
    zero = {"stage": int(engine[4]), **OF_ZERO, **(OF_ZERO_3 if engine == "zero3" else {})}
    given = json.dumps({**PASSED, "zero_optimization": zero})
    assert problems(json.loads(given), "") == []
    case = Setup(engine=engine, labels="third_missing", clip_norm=0.5, last_step=3, deepspeed=given)
    expected = plain(case.with_(engine="single", deepspeed=""))
    found = shared_pool(2).run(train, case)[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_same_model(found.state, expected.state)
    assert_same_optimizer(found.state, expected.state)


def test_the_fields_of_the_installed_deepspeed_are_all_in_the_table() -> None:
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for prefix, settings in (
        ("", DeepSpeedZeroConfig),
        ("offload_optimizer.", DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param.", DeepSpeedZeroOffloadParamConfig),
    ):
        for name, entry in settings.model_fields.items():
            key = f"zero_optimization.{prefix}{entry.alias or name}"
            assert any(known == key or known.startswith(f"{key}.") for known in KEYS), key


@pytest.mark.parametrize(("engine", "size"), RUNS)
def test_the_gradient_of_every_parameter_is_that_of_a_single_process(engine: EngineName, size: int) -> None:
    # One step of plain SGD at a rate of 1 moves every weight by its gradient.
    cases = [
        Setup(engine=engine, labels=labels, accumulation=accumulation, optimizer="plain_sgd", last_step=1)
        for labels, accumulation in product(("all", "third_missing", "disjoint"), (1, 2))
    ]
    for case, found in zip(cases, shared_pool(size).run(train_all, cases)[0], strict=True):
        before = build_root(case).state_dict()
        expected = plain(case.with_(engine="single", accumulation=1))
        for name, weight in before.items():
            gradient = weight - expected.state.model[name]
            assert gradient.norm() > 0, name
            torch.testing.assert_close(weight - found.state.model[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("engine", "size"), RUNS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_absent_task_keeps_its_weights_and_optimizer_state_to_the_bit(
    engine: EngineName, size: int, optimizer: str
) -> None:
    case = Setup(engine=engine, optimizer=optimizer, labels="sometimes_absent", every_state=True)
    states = shared_pool(size).run(train, case)[0].states
    belongs_to_gamma = ("heads.gamma.", "scales.gamma")
    # gamma has labels in steps 1 and 4 alone.
    assert not any(name in key for key in states[0].optimizer for name in belongs_to_gamma)
    for step in (2, 3, 5):
        before, after = states[step - 1], states[step]
        for kind in ("model", "optimizer"):
            old, new = getattr(before, kind), getattr(after, kind)
            for key in old:
                if any(name in key for name in belongs_to_gamma):
                    assert torch.equal(old[key], new[key]), (step, key)
        assert not torch.equal(before.model["heads.alpha.weight"], after.model["heads.alpha.weight"])
    for key in ("heads.gamma.0.weight", "scales.gamma"):
        assert not torch.equal(states[3].model[key], states[4].model[key])


@pytest.mark.parametrize("engine", TWO_RANKS)
def test_batch_statistics_are_the_mean_over_the_ranks(engine: EngineName) -> None:
    case = Setup(engine=engine, batch_norm=True, optimizer="sgd", last_step=3)
    found, expected = (shared_pool(2).run(train, c)[0].state for c in (case, case.with_(engine="ddp")))
    assert_same_model(found, expected)
    assert found.model["body.3.num_batches_tracked"] == 3


@pytest.mark.parametrize(("engine", "size"), RUNS)
def test_a_frozen_body_stays_and_has_no_optimizer_state(engine: EngineName, size: int) -> None:
    case = Setup(engine=engine, frozen_body=True, last_step=3)
    found = shared_pool(size).run(train, case)[0].state
    for name, weight in build_root(case).state_dict().items():
        if name.startswith("body."):
            assert torch.equal(found.model[name], weight)
            assert f"exp_avg/{name}" not in found.optimizer
    assert_same_model(found, plain(case.with_(engine="single")).state)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_an_optimizer_on_the_host_gives_the_same_numbers(engine: EngineName) -> None:
    case = Setup(engine=engine, labels="sometimes_absent", accumulation=2, offload_optimizer=True)
    cases = [case]
    if engine == "zero3":
        cases.append(case.with_(offload_parameters=True))
    for found in shared_pool(2).run(train_all, cases)[0]:
        expected = plain(Setup(labels="sometimes_absent"))
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert_same_model(found.state, expected.state)
        assert_same_optimizer(found.state, expected.state)


# ------------------------------------------------------------------ precision
@pytest.mark.parametrize("engine", TWO_RANKS)
def test_bf16_is_the_same_under_every_engine(engine: EngineName) -> None:
    # The same micro-batches are rounded in the same way; only the order of float32 sums differs.
    case = Setup(engine=engine, precision="bf16", labels="third_missing", optimizer="sgd", last_step=1)
    found, expected = (shared_pool(2).run(train, c)[0] for c in (case, case.with_(engine="ddp")))
    assert found.losses == expected.losses
    assert_same_model(found.state, expected.state)


@pytest.mark.parametrize("engine", TWO_RANKS)
def test_bf16_stays_near_fp32(engine: EngineName) -> None:
    # bf16 keeps 8 bits: a product is off by 2^-9 of itself, and a loss is a sum of squares of such.
    case = Setup(engine=engine, precision="bf16", optimizer="sgd", last_step=1)
    found = shared_pool(2).run(train, case)[0]
    assert found.losses == pytest.approx(plain(Setup(optimizer="sgd", last_step=1)).losses, rel=2**-7)
    assert all(tensor.dtype == torch.float32 for tensor in found.state.model.values())


@pytest.mark.parametrize(
    ("engine", "size", "on_host"),
    [
        *((engine, size, False) for engine, size in RUNS),
        ("zero1", 2, True),
        ("zero2", 2, True),
        ("zero3", 2, True),
    ],
)
def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(
    engine: EngineName, size: int, on_host: bool
) -> None:
    case = Setup(engine=engine, precision="fp16", explode_at=(3, 4), every_state=True, last_step=7)
    results = shared_pool(size).run(train, case.with_(offload_optimizer=on_host))
    first = results[0]
    assert first.skipped[3] and first.skipped[4] and not first.skipped[5]
    assert all(other.skipped == first.skipped for other in results)
    for step in (3, 4):
        before, after = first.states[step - 1], first.states[step]
        assert all(torch.equal(after.model[name], weight) for name, weight in before.model.items())
        assert all(torch.equal(after.optimizer[key], value) for key, value in before.optimizer.items())
        assert after.scaler["scale"] == before.scaler["scale"] / 2
    assert first.state.scaler["num_skipped"] == sum(first.skipped)
    assert all(other.state.scaler == first.state.scaler for other in results)


@pytest.mark.parametrize("engine", TWO_RANKS)
def test_fp16_skips_the_same_steps_and_learns_the_same_under_every_engine(engine: EngineName) -> None:
    case = Setup(engine=engine, precision="fp16", optimizer="sgd", clip_norm=0.5)
    found, expected = (shared_pool(2).run(train, c)[0] for c in (case, case.with_(engine="ddp")))
    assert found.skipped == expected.skipped
    # One rounding of fp16 after another: 11 bits each.
    assert found.losses == pytest.approx(expected.losses, rel=2**-10)


@pytest.mark.parametrize(("engine", "size"), RUNS)
def test_an_infinite_gradient_without_a_loss_scale_changes_nothing(engine: EngineName, size: int) -> None:
    case = Setup(engine=engine, explode_at=(1,), every_state=True, last_step=3)
    results = shared_pool(size).run(train, case)
    assert all(result.skipped == [False, True, False] for result in results)
    before, after, later = results[0].states
    for name, tensor in {**before.model, **before.optimizer}.items():
        assert torch.equal(tensor, {**after.model, **after.optimizer}[name]), name
    assert all(tensor.isfinite().all() for tensor in later.model.values())
