"""Equal and fixed weights, and what every balancer promises through its base."""

from __future__ import annotations

import pytest
import torch

from mtl_dist.balance.balancer import Balancer
from mtl_dist.balance.equal import Equal
from mtl_dist.balance.fixed import Fixed
from mtl_dist.balance.method import generator
from mtl_dist.balance.methods import BalanceSettings, build_balancer
from mtl_dist.errors import UserError

TASKS = ("digit", "thickness", "ink")
FACTORS = {"digit": 1.0, "thickness": 0.5, "ink": 1.0}
ONES = dict.fromkeys(TASKS, 1.0)
ALL = torch.ones(3, dtype=torch.bool)


def build(settings: BalanceSettings, weights: dict[str, float] = ONES) -> Balancer:
    return build_balancer(settings, TASKS, FACTORS, weights)


def test_equal_weights_are_one() -> None:
    assert build(Equal()).weights(present_T=ALL, key=(0, 0)).tolist() == [1.0, 1.0, 1.0]


def test_fixed_weights_are_those_of_the_recipe_in_the_order_of_the_tasks() -> None:
    balancer = build(Fixed(), {"ink": 0.5, "digit": 2.0, "thickness": 0.0})
    assert balancer.weights(present_T=ALL, key=(0, 0)).tolist() == [2.0, 0.0, 0.5]


def test_fixed_weights_come_from_the_recipe_also_after_a_checkpoint_is_loaded() -> None:
    old = build(Fixed(), {"digit": 2.0, "thickness": 1.0, "ink": 1.0})
    old.weights(present_T=ALL, key=(0, 0))
    new = build(Fixed())
    new.load_state_dict(old.state_dict())
    assert new.weights(present_T=ALL, key=(0, 1)).tolist() == [1.0, 1.0, 1.0]


def test_a_weight_that_the_method_would_ignore_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"tasks\.ink\.weight: expected 1 under balance\.method equal.*found 0\.5"
    ):
        build(Equal(), {**ONES, "ink": 0.5})


def test_an_absent_task_has_weight_zero_and_its_nan_loss_reaches_neither_value_nor_gradient() -> None:
    balancer = build(Equal())
    present_T = torch.tensor([True, False, True])
    weights_T = balancer.weights(present_T=present_T, key=(0, 0))
    losses_T = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    scalar = balancer.combine(losses_T, weights_T, present_T)
    scalar.backward()
    assert weights_T.tolist() == [1.0, 0.0, 1.0]
    assert scalar.item() == 4.0
    assert losses_T.grad is not None and losses_T.grad.tolist() == [1.0, 0.0, 1.0]


def test_a_cast_of_the_model_to_bfloat16_leaves_the_state_in_full_precision() -> None:
    balancer = build(Fixed(), {**ONES, "ink": 0.3})
    balancer.weights(present_T=ALL, key=(0, 0))
    torch.nn.ModuleList([balancer]).bfloat16()
    assert balancer.last_weights_T.dtype == torch.float32
    assert balancer.last_weights_T[2].item() == pytest.approx(0.3, abs=1e-7)
    assert balancer.num_unconverged.dtype == torch.int64


def test_random_choices_depend_on_seed_and_step_alone() -> None:
    draw = {
        key: torch.rand(4, generator=generator(key, "cpu")).tolist()
        for key in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert draw[0, 1] == torch.rand(4, generator=generator((0, 1), "cpu")).tolist()
    assert len({tuple(numbers) for numbers in draw.values()}) == 4
