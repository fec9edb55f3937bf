"""The methods that look at losses only: rlw, gls, stch, dwa, famo, uncertainty, imtl-l."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtl_dist.balance.balancer import Balancer
from mtl_dist.balance.dwa import DWA
from mtl_dist.balance.famo import FAMO
from mtl_dist.balance.gls import GLS
from mtl_dist.balance.imtl_l import IMTLL
from mtl_dist.balance.methods import BalanceSettings, build_balancer
from mtl_dist.balance.rlw import RLW
from mtl_dist.balance.stch import STCH
from mtl_dist.balance.uncertainty import Uncertainty

TASKS = ("digit", "thickness", "ink")
FACTORS = {"digit": 1.0, "thickness": 0.5, "ink": 1.0}
ALL = torch.ones(3, dtype=torch.bool)
WITHOUT_INK = torch.tensor([True, True, False])
NAN = float("nan")


def build(settings: BalanceSettings, weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Balancer:
    return build_balancer(settings, TASKS, FACTORS, dict(zip(TASKS, weights, strict=True)))


def gradient(scalar: Tensor, losses_T: Tensor) -> Tensor:
    return torch.autograd.grad(scalar, losses_T)[0]


def assert_weights_are_the_gradient(
    balancer: Balancer, scalarisation: Callable[[Tensor], Tensor], losses_T: Tensor
) -> None:
    weights_T = balancer.weights(present_T=ALL, key=(0, 0), losses_T=losses_T)
    differentiable_T = losses_T.clone().requires_grad_()
    expected_T = gradient(scalarisation(differentiable_T), differentiable_T)
    found_T = gradient(balancer.combine(differentiable_T, weights_T, ALL), differentiable_T)
    torch.testing.assert_close(found_T, expected_T, rtol=1e-5, atol=1e-7)


# --- every method that weighs by losses -----------------------------------------------------------

LOSS_METHODS = [RLW(), GLS(), STCH(), DWA(), FAMO()]
by_method = pytest.mark.parametrize("settings", LOSS_METHODS, ids=lambda settings: settings.method)


@by_method
def test_an_absent_task_has_weight_zero_and_its_nan_loss_disturbs_nobody(settings: BalanceSettings) -> None:
    with_nan, with_number = build(settings), build(settings)
    for step in range(4):
        a_T = with_nan.weights(
            present_T=WITHOUT_INK, key=(1, step), losses_T=torch.tensor([0.5, 2.0 - step / 4, NAN])
        )
        b_T = with_number.weights(
            present_T=WITHOUT_INK, key=(1, step), losses_T=torch.tensor([0.5, 2.0 - step / 4, 9])
        )
        assert a_T[2] == 0 and a_T.isfinite().all()
        assert a_T.tolist() == b_T.tolist()
    assert with_nan.num_unconverged == 0


@by_method
def test_a_window_without_any_label_gives_zeros_and_changes_no_state(settings: BalanceSettings) -> None:
    balancer = build(settings)
    balancer.weights(present_T=ALL, key=(1, 0), losses_T=torch.tensor([0.5, 2.0, 1.0]))
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    weights_T = balancer.weights(present_T=~ALL, key=(1, 1), losses_T=torch.full((3,), NAN))
    assert weights_T.tolist() == [0.0, 0.0, 0.0]
    for name, value in balancer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@by_method
def test_resuming_from_the_state_dict_equals_never_stopping(settings: BalanceSettings) -> None:
    generator = torch.Generator().manual_seed(3)
    windows = [torch.rand(3, generator=generator) + 0.1 for _ in range(12)]
    never_stopped, stopped = build(settings), build(settings)

    def run(balancer: Balancer, steps: range) -> list[list[float]]:
        found = []
        for step in steps:
            weights_T = balancer.weights(present_T=ALL, key=(7, step), losses_T=windows[step])
            balancer.observe(windows[step], ALL)
            if step % 2 == 1:
                balancer.end_epoch()
            found.append(weights_T.tolist())
        return found

    expected = run(never_stopped, range(12))
    first = run(stopped, range(5))
    resumed = build(settings)
    resumed.load_state_dict(stopped.state_dict())
    assert first + run(resumed, range(5, 12)) == expected


@by_method
def test_permuting_the_tasks_permutes_the_weights(settings: BalanceSettings) -> None:
    if settings.method == "rlw":
        pytest.skip("rlw draws by position")
    order = [2, 0, 1]
    straight, permuted = build(settings), build(settings)
    for step in range(6):
        losses_T = torch.tensor([1.0 / (step + 1), 2.0, 0.3 * (step + 1)])
        a_T = straight.weights(present_T=ALL, key=(0, step), losses_T=losses_T)
        b_T = permuted.weights(present_T=ALL, key=(0, step), losses_T=losses_T[order])
        straight.observe(losses_T, ALL)
        permuted.observe(losses_T[order], ALL)
        straight.end_epoch()
        permuted.end_epoch()
        torch.testing.assert_close(a_T[order], b_T, rtol=1e-5, atol=1e-7)


@by_method
def test_losses_that_are_not_finite_keep_the_last_weights_are_counted_and_poison_nothing(
    settings: BalanceSettings,
) -> None:
    balancer, undisturbed = build(settings), build(settings)
    good_T = torch.tensor([0.5, 2.0, 1.0])
    last_T = balancer.weights(present_T=ALL, key=(1, 0), losses_T=good_T)
    undisturbed.weights(present_T=ALL, key=(1, 0), losses_T=good_T)
    for bad in (NAN, math.inf):
        bad_T = torch.tensor([0.5, bad, 1.0])
        found_T = balancer.weights(present_T=ALL, key=(1, 1), losses_T=bad_T)
        balancer.observe(bad_T, ALL)
        assert found_T.tolist() == last_T.tolist()
    assert balancer.num_unconverged == 2
    balancer.end_epoch()
    assert balancer.weights(present_T=ALL, key=(1, 2), losses_T=good_T).isfinite().all()


# --- rlw --------------------------------------------------------------------------------------------


def test_rlw_draws_by_seed_and_step_and_sums_to_one() -> None:
    first_T = build(RLW()).weights(present_T=ALL, key=(5, 9))
    again_T = build(RLW()).weights(present_T=ALL, key=(5, 9))
    other_T = build(RLW()).weights(present_T=ALL, key=(5, 10))
    assert first_T.tolist() == again_T.tolist() != other_T.tolist()
    assert first_T.sum().item() == pytest.approx(1.0)


def test_rlw_draws_the_same_ratios_whether_or_not_another_task_is_absent() -> None:
    all_T = build(RLW()).weights(present_T=ALL, key=(5, 9))
    two_T = build(RLW()).weights(present_T=WITHOUT_INK, key=(5, 9))
    assert (two_T[0] / two_T[1]).item() == pytest.approx((all_T[0] / all_T[1]).item(), rel=1e-5)


# --- gls and stch -----------------------------------------------------------------------------------


def test_gls_is_the_gradient_of_the_geometric_mean() -> None:
    losses_T = torch.tensor([0.3, 2.0, 7.0])
    assert_weights_are_the_gradient(build(GLS()), lambda values_T: values_T.prod() ** (1 / 3), losses_T)


def test_gls_weighted_losses_sum_to_the_geometric_mean() -> None:
    losses_T = torch.tensor([0.5, 2.0, 8.0])
    weights_T = build(GLS()).weights(present_T=ALL, key=(0, 0), losses_T=losses_T)
    assert (weights_T * losses_T).sum().item() == pytest.approx(2.0, rel=1e-6)


def test_gls_of_a_loss_that_reached_zero_is_finite() -> None:
    weights_T = build(GLS()).weights(present_T=ALL, key=(0, 0), losses_T=torch.tensor([0.0, 1.0, 1.0]))
    assert weights_T.isfinite().all()


@pytest.mark.parametrize("mu", [0.05, 1.0, 10.0])
def test_stch_is_the_gradient_of_the_smooth_maximum_with_the_recipes_weights(mu: float) -> None:
    preference_T = torch.tensor([0.5, 1.0, 2.0])

    def smooth_maximum(values_T: Tensor) -> Tensor:
        return mu * torch.logsumexp(preference_T * values_T / mu, dim=0)

    balancer = build(STCH(mu=mu), (0.5, 1.0, 2.0))
    assert_weights_are_the_gradient(balancer, smooth_maximum, torch.tensor([0.3, 2.0, 1.1]))


# --- dwa --------------------------------------------------------------------------------------------


def test_dwa_weighs_by_the_ratio_of_the_last_two_epochs() -> None:
    balancer = build(DWA(temperature=1.5))
    generator = torch.Generator().manual_seed(0)
    means: list[Tensor] = []
    for epoch in range(4):
        windows = torch.rand(5, 3, generator=generator) + 0.1
        rates_T = means[-1] / means[-2] if epoch >= 2 else torch.ones(3)
        for losses_T in windows:
            weights_T = balancer.weights(present_T=ALL, key=(0, 0))
            torch.testing.assert_close(
                weights_T, 3 * torch.softmax(rates_T / 1.5, dim=0), rtol=1e-5, atol=1e-6
            )
            balancer.observe(losses_T, ALL)
        balancer.end_epoch()
        means.append(windows.mean(dim=0))


def test_dwa_keeps_the_history_of_a_task_that_was_absent_for_an_epoch() -> None:
    balancer = build(DWA())
    for losses, present_T in [
        ([1.0, 1.0, 4.0], ALL),
        ([0.5, 1.0, 2.0], ALL),
        ([0.25, 1.0, NAN], WITHOUT_INK),
        ([0.125, 1.0, NAN], WITHOUT_INK),
    ]:
        balancer.observe(torch.tensor(losses), present_T)
        balancer.end_epoch()
    weights_T = balancer.weights(present_T=ALL, key=(0, 0))
    expected_T = 3 * torch.softmax(torch.tensor([0.5, 1.0, 0.5]) / 2, dim=0)
    torch.testing.assert_close(weights_T, expected_T)


# --- famo -------------------------------------------------------------------------------------------


def test_famo_takes_the_steps_of_its_algorithm() -> None:
    settings = FAMO()
    balancer = build(settings)
    logits_T = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([logits_T], lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(0)
    losses_T = torch.rand(3, generator=generator) + 0.5
    for step in range(50):
        weights_T = balancer.weights(present_T=ALL, key=(0, step), losses_T=losses_T)
        shares_T = torch.softmax(logits_T.detach(), dim=0) / losses_T
        torch.testing.assert_close(weights_T, shares_T / shares_T.sum(), rtol=1e-4, atol=1e-6)
        # What a second forward after the step would see is here what the next window sees.
        after_T = losses_T * (0.9 + 0.1 * torch.rand(3, generator=generator))
        adam.zero_grad()
        torch.softmax(logits_T, dim=0).backward(losses_T.log() - after_T.log())
        adam.step()
        losses_T = after_T


def test_famo_leaves_logits_and_moments_of_an_absent_task_as_they_were() -> None:
    balancer = build(FAMO())
    for step in range(5):
        losses_T = torch.tensor([1.0, 0.8**step, 0.9**step])
        balancer.weights(present_T=ALL, key=(0, step), losses_T=losses_T)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    for step in range(5, 10):
        balancer.weights(present_T=WITHOUT_INK, key=(0, step), losses_T=torch.tensor([1.0, 0.8**step, NAN]))
    for name, value in balancer.state_dict().items():
        if name != "num_unconverged":
            assert value[2] == before[name][2], name
            assert name == "last_weights_T" or not torch.equal(value[:2], before[name][:2]), name


def test_famo_of_a_loss_that_reached_zero_is_finite() -> None:
    balancer = build(FAMO())
    for step in range(3):
        weights_T = balancer.weights(present_T=ALL, key=(0, step), losses_T=torch.tensor([0.0, 1.0, 1.0]))
        assert weights_T.isfinite().all()


# --- uncertainty and imtl-l: trained with the model ---------------------------------------------------

LEARNED = [Uncertainty(), IMTLL()]
by_learned = pytest.mark.parametrize("settings", LEARNED, ids=lambda settings: settings.method)


def set_scales(balancer: Balancer, values: tuple[float, ...]) -> None:
    with torch.no_grad():
        for name, value in zip(TASKS, values, strict=True):
            balancer.task_parameters(name)[0].fill_(value)


def test_uncertainty_halves_the_factor_of_regression_alone() -> None:
    balancer = build(Uncertainty())
    set_scales(balancer, (0.2, -0.4, 0.6))
    weights_T = balancer.weights(present_T=ALL, key=(0, 0))
    expected_T = torch.tensor([math.exp(-0.2), math.exp(0.4) / 2, math.exp(-0.6)])
    torch.testing.assert_close(weights_T, expected_T)
    losses_T = torch.tensor([0.7, 1.5, 3.0])
    scalar = balancer.combine(losses_T, weights_T, ALL)
    assert scalar.item() == pytest.approx(
        (expected_T * losses_T).sum().item() + (0.2 - 0.4 + 0.6) / 2, rel=1e-6
    )


def test_imtl_l_is_its_formula() -> None:
    balancer = build(IMTLL())
    set_scales(balancer, (0.2, -0.4, 0.6))
    losses_T, scales_T = torch.tensor([0.7, 1.5, 3.0]), torch.tensor([0.2, -0.4, 0.6])
    weights_T = balancer.weights(present_T=ALL, key=(0, 0))
    torch.testing.assert_close(weights_T, scales_T.exp())
    expected = (scales_T.exp() * losses_T - scales_T).sum()
    torch.testing.assert_close(balancer.combine(losses_T, weights_T, ALL), expected)


@by_learned
def test_a_window_cut_into_micro_batches_gives_the_same_gradients(settings: BalanceSettings) -> None:
    losses_T = torch.tensor([0.7, 1.5, 3.0])
    parts = [losses_T * 0.25, losses_T * 0.5, losses_T * 0.25]
    gradients = []
    for pieces in ([losses_T], parts):
        balancer = build(settings)
        set_scales(balancer, (0.2, -0.4, 0.6))
        weights_T = balancer.weights(present_T=ALL, key=(0, 0))
        for piece_T in pieces:
            balancer.combine(piece_T, weights_T, ALL, scale=1 / len(pieces)).backward()
        gradients.append(
            [float(parameter.grad) for parameter in balancer.parameters() if parameter.grad is not None]
        )
    # Differences of terms near 1: their rounding is absolute.
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6, abs=1e-7)
    assert len(gradients[0]) == 3


@by_learned
def test_the_gradient_of_an_absent_tasks_scale_is_exactly_zero(settings: BalanceSettings) -> None:
    balancer = build(settings)
    weights_T = balancer.weights(present_T=WITHOUT_INK, key=(0, 0))
    balancer.combine(torch.tensor([0.7, 1.5, NAN]), weights_T, WITHOUT_INK).backward()
    gradients = {name: balancer.task_parameters(name)[0].grad for name in TASKS}
    assert gradients["ink"] == 0.0
    assert gradients["digit"] != 0.0 and gradients["thickness"] != 0.0


@by_learned
def test_training_the_scales_alone_finds_the_known_optimum(settings: BalanceSettings) -> None:
    balancer = build(settings)
    losses_T = torch.tensor([0.25, 2.0, 4.0])
    optimizer = torch.optim.LBFGS(balancer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scalar = balancer.combine(losses_T, torch.ones(3), ALL)
        scalar.backward()
        return scalar

    for _ in range(5):
        optimizer.step(closure)  # type: ignore[arg-type]
    weights_T = balancer.weights(present_T=ALL, key=(0, 0))
    # Both bring every weighted loss to a constant: imtl-l to 1, uncertainty to 1/2.
    target = 1.0 if settings.method == "imtl-l" else 0.5
    torch.testing.assert_close(weights_T * losses_T, torch.full((3,), target), rtol=1e-3, atol=1e-3)
