"""The methods on gradients: published values, and what each of them promises by its definition."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_dist.balance import solvers
from mtl_dist.balance.aligned import Aligned
from mtl_dist.balance.balancer import Balancer
from mtl_dist.balance.cagrad import CAGrad
from mtl_dist.balance.dualproj import DualProj
from mtl_dist.balance.fairgrad import FairGrad
from mtl_dist.balance.gradient import Problem
from mtl_dist.balance.gradnorm import GradNorm
from mtl_dist.balance.imtl_g import IMTLG
from mtl_dist.balance.method import Window
from mtl_dist.balance.methods import BalanceSettings, build_balancer
from mtl_dist.balance.mgda import MGDA
from mtl_dist.balance.nash import Nash
from mtl_dist.balance.pcgrad import PCGrad
from mtl_dist.balance.upgrad import UPGrad

METHODS: list[Any] = [
    GradNorm(),
    MGDA(),
    MGDA(normalize="l2"),
    MGDA(normalize="loss+"),
    PCGrad(),
    CAGrad(),
    CAGrad(c=0.8, rescale=False),
    IMTLG(),
    Nash(),
    FairGrad(),
    FairGrad(alpha=2.0),
    Aligned(),
    UPGrad(),
    DualProj(),
]


def name(settings: BalanceSettings) -> str:
    return (
        "-".join(str(value) for value in settings.model_dump(exclude_defaults=True).values())
        or settings.method
    )


every_method = pytest.mark.parametrize("settings", METHODS, ids=lambda s: f"{s.method}-{name(s)}")
KINDS = ["random", "duplicate", "opposite", "zero", "agreeing", "lengths", "dependent", "all zero"]


def jacobian(kind: str, num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * num_tasks + seed)
    num_parameters = max(2, num_tasks // 2) if kind == "dependent" else 4 * num_tasks
    jacobian_TP = torch.randn(num_tasks, num_parameters, generator=generator, dtype=torch.float64)
    if kind == "duplicate":
        jacobian_TP[1] = jacobian_TP[0]
    elif kind == "opposite":
        jacobian_TP[1] = -jacobian_TP[0]
    elif kind == "zero":
        jacobian_TP[0] = 0
    elif kind == "agreeing":
        jacobian_TP += 0.7
    elif kind == "lengths":
        jacobian_TP *= torch.exp(4 * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64))
    elif kind == "all zero":
        jacobian_TP *= 0
    return jacobian_TP


def build(settings: BalanceSettings, num_tasks: int) -> Balancer:
    names = [f"task{i}" for i in range(num_tasks)]
    return build_balancer(settings, names, dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))


def all_present(num_tasks: int) -> Tensor:
    return torch.ones(num_tasks, dtype=torch.bool)


def losses(num_tasks: int) -> Tensor:
    return torch.linspace(0.5, 2.0, num_tasks)


def solve(settings: BalanceSettings, jacobian_TP: Tensor, key: tuple[int, int] = (0, 0)) -> Tensor:
    """The weights for one Jacobian, from its float32 Gramian; there must be a solution."""
    num_tasks = len(jacobian_TP)
    balancer = build(settings, num_tasks)
    weights_T = balancer.weights(
        present_T=all_present(num_tasks),
        key=key,
        losses_T=losses(num_tasks),
        gramian_TT=(jacobian_TP @ jacobian_TP.T).float(),
    )
    assert balancer.num_unconverged == 0
    assert weights_T.dtype == torch.float32 and weights_T.isfinite().all()
    return weights_T.double()


# --- published values -------------------------------------------------------------------------------

J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
PUBLISHED: list[tuple[Any, tuple[float, float]]] = [
    (Aligned(), (0.5591, 0.4083)),
    (IMTLG(), (0.5923, 0.4077)),
    (MGDA(), (0.6, 0.4)),
    (PCGrad(), (2.2222, 1.5789)),
    (CAGrad(c=0.5, rescale=False), (0.7041, 0.5)),
    (FairGrad(alpha=1.0), (0.5915, 0.4071)),
    # By hand. The published (1.1109, 0.7894) and (0.6109, 0.5) contain TorchJD's ridge of 1e-4.
    (UPGrad(), (10 / 9, 15 / 19)),
    (DualProj(), (11 / 18, 0.5)),
]


@pytest.mark.parametrize(("settings", "expected"), PUBLISHED, ids=lambda value: getattr(value, "method", ""))
def test_the_weights_are_the_published_ones(settings: BalanceSettings, expected: tuple[float, float]) -> None:
    torch.testing.assert_close(
        solve(settings, J), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_the_update_of_nash_is_the_published_one() -> None:
    expected_P = torch.tensor([0.0542, 0.7061, 0.7061], dtype=torch.float64)
    torch.testing.assert_close(solve(Nash(max_norm=1.0), J) @ J, expected_P, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_for_two_tasks_imtl_g_is_proportional_to_nash_and_upgrad_is_half_of_pcgrad(seed: int) -> None:
    jacobian_TP = jacobian("random", 2, seed)
    ratio_T = solve(IMTLG(), jacobian_TP) / solve(Nash(), jacobian_TP)
    assert ratio_T[0].item() == pytest.approx(ratio_T[1].item(), rel=1e-4)
    upgrad_T, pcgrad_T = solve(UPGrad(), jacobian_TP), solve(PCGrad(), jacobian_TP)
    torch.testing.assert_close(2 * upgrad_T, pcgrad_T, rtol=1e-4, atol=1e-4)


# --- every method -----------------------------------------------------------------------------------


@every_method
def test_hard_gradients_have_a_solution(settings: BalanceSettings) -> None:
    for num_tasks in (2, 5, 20):
        for kind in KINDS:
            solve(settings, jacobian(kind, num_tasks))


BOUNDED = [
    MGDA(),
    PCGrad(),
    CAGrad(),
    Aligned(),
    UPGrad(),
    DualProj(),
]


@pytest.mark.parametrize("settings", BOUNDED, ids=lambda s: s.method)
def test_hard_gradients_give_no_huge_update(settings: BalanceSettings) -> None:
    for num_tasks in (2, 5, 20):
        for kind in KINDS:
            jacobian_TP = jacobian(kind, num_tasks)
            update_P = solve(settings, jacobian_TP) @ jacobian_TP
            # PCGrad and CAGrad reach the sum of all gradients, each at most twice as long.
            assert update_P.norm() <= 2 * num_tasks * jacobian_TP.norm(dim=1).max() + 1e-12


@pytest.mark.parametrize("kind", ["random", "lengths", "agreeing"])
@pytest.mark.parametrize("num_tasks", [2, 7])
@every_method
def test_permuting_the_tasks_permutes_the_weights(
    settings: BalanceSettings, num_tasks: int, kind: str
) -> None:
    if settings.method == "pcgrad" and num_tasks > 2:
        pytest.skip("pcgrad draws its orders by position")
    jacobian_TP = jacobian(kind, num_tasks)
    order = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(1))
    gramian_TT = (jacobian_TP @ jacobian_TP.T).float()
    present_T, losses_T = all_present(num_tasks), losses(num_tasks)
    straight_T = build(settings, num_tasks).weights(
        present_T=present_T, key=(0, 0), losses_T=losses_T, gramian_TT=gramian_TT
    )
    permuted_T = build(settings, num_tasks).weights(
        present_T=present_T, key=(0, 0), losses_T=losses_T[order], gramian_TT=gramian_TT[order][:, order]
    )
    torch.testing.assert_close(
        permuted_T, straight_T[order], rtol=1e-5, atol=1e-6 * float(straight_T.abs().max())
    )


@pytest.mark.parametrize("ratio", [1e3, 1e7, 1e10])
def test_aligned_does_not_depend_on_the_order_of_tasks_of_very_different_length(ratio: float) -> None:
    jacobian_TP = jacobian("random", 6)
    jacobian_TP[1::2] /= ratio ** torch.linspace(0.5, 1, 3, dtype=torch.float64)[:, None]
    gramian_TT = jacobian_TP @ jacobian_TP.T

    def weights(order: list[int]) -> Tensor:
        problem = Problem(gramian_TT[order][:, order], losses(6).double(), all_present(6), (0, 0), {})
        return Aligned().solve(problem)[torch.tensor(order).argsort()]

    expected_T = weights(list(range(6)))
    # All components as long as the smallest: the update's weights have the metric G, w^T G w = l_min / T.
    lengths = torch.linalg.svdvals(jacobian_TP)
    torch.testing.assert_close(expected_T @ gramian_TT @ expected_T, lengths[-1] ** 2 / 6, rtol=1e-6, atol=0)
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
        torch.testing.assert_close(weights(order), expected_T, rtol=1e-9, atol=1e-12)


@every_method
def test_an_absent_task_takes_no_part_whatever_its_row_holds(settings: BalanceSettings) -> None:
    jacobian_TP = jacobian("random", 4)
    gramian_TT = (jacobian_TP @ jacobian_TP.T).float()
    present_T = torch.tensor([True, False, True, True])
    without_T = build(settings, 3).weights(
        present_T=all_present(3),
        key=(0, 0),
        losses_T=losses(4)[present_T],
        gramian_TT=gramian_TT[present_T][:, present_T],
    )
    losses_T = losses(4)
    losses_T[1] = math.nan
    gramian_TT[1] = gramian_TT[:, 1] = math.nan
    balancer = build(settings, 4)
    found_T = balancer.weights(present_T=present_T, key=(0, 0), losses_T=losses_T, gramian_TT=gramian_TT)
    torch.testing.assert_close(found_T[present_T], without_T, rtol=1e-6, atol=0)
    assert found_T[1] == 0
    assert balancer.last_weights_T[1] == 0.25, "the state of the absent task"
    assert balancer.num_unconverged == 0


@every_method
def test_a_window_without_any_label_gives_zeros(settings: BalanceSettings) -> None:
    balancer = build(settings, 3)
    nan_TT = torch.full((3, 3), math.nan)
    weights_T = balancer.weights(present_T=~all_present(3), key=(0, 0), losses_T=nan_TT[0], gramian_TT=nan_TT)
    assert weights_T.tolist() == [0.0, 0.0, 0.0]
    assert balancer.num_unconverged == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_method
def test_a_gramian_that_is_not_finite_keeps_the_last_weights_and_is_counted(
    settings: BalanceSettings, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    jacobian_TP = jacobian("random", 3)
    gramian_TT = (jacobian_TP @ jacobian_TP.T).float()
    balancer = build(settings, 3)
    present_T, losses_T = all_present(3), losses(3)
    first_T = balancer.weights(present_T=present_T, key=(0, 0), losses_T=losses_T, gramian_TT=gramian_TT)
    gramian_TT[1, 1] = bad
    with caplog.at_level(logging.WARNING):
        again_T = balancer.weights(present_T=present_T, key=(0, 1), losses_T=losses_T, gramian_TT=gramian_TT)
    assert again_T.tolist() == first_T.tolist()
    assert balancer.num_unconverged == 1
    assert "step 1" in caplog.text and "not finite" in caplog.text


ITERATIVE = [
    Nash(),
    FairGrad(),
    CAGrad(),
    MGDA(),
    UPGrad(),
    DualProj(),
]


@pytest.mark.parametrize("settings", ITERATIVE, ids=name)
def test_a_solve_that_does_not_converge_keeps_the_last_weights_and_is_counted(
    settings: BalanceSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jacobian_TP = jacobian("random", 3)
    gramian_TT = (jacobian_TP @ jacobian_TP.T).float()
    balancer = build(settings, 3)
    present_T, losses_T = all_present(3), losses(3)
    first_T = balancer.weights(present_T=present_T, key=(0, 0), losses_T=losses_T, gramian_TT=gramian_TT)
    monkeypatch.setattr(solvers, "MAX_NEWTON_STEPS", 0)
    monkeypatch.setattr(solvers, "_wrong", lambda matrix, linear, passive, x: np.full(x.shape, True))
    monkeypatch.setattr("mtl_dist.balance.cagrad.MAX_LEVELS", 0)
    with caplog.at_level(logging.WARNING):
        again_T = balancer.weights(
            present_T=present_T, key=(0, 1), losses_T=losses_T, gramian_TT=gramian_TT * 3
        )
    assert again_T.tolist() == first_T.tolist()
    assert balancer.num_unconverged == 1
    assert "the last ones are used again" in caplog.text


@every_method
def test_weights_are_kept_between_the_solves_of_every_n_steps(settings: BalanceSettings) -> None:
    settings = settings.model_copy(update={"every": 3})
    balancer = build(settings, 3)
    assert [balancer.needs_at(step) for step in range(4)] == ["gramian", "nothing", "nothing", "gramian"]
    jacobian_TP = jacobian("random", 3)
    first_T = balancer.weights(
        present_T=all_present(3),
        key=(0, 0),
        losses_T=losses(3),
        gramian_TT=(jacobian_TP @ jacobian_TP.T).float(),
    )
    kept_T = balancer.weights(present_T=all_present(3), key=(0, 1))
    absent_T = balancer.weights(present_T=torch.tensor([True, False, True]), key=(0, 2))
    assert kept_T.tolist() == first_T.tolist()
    assert absent_T.tolist() == [first_T[0], 0.0, first_T[2]]
    assert balancer.num_unconverged == 0


@every_method
def test_resuming_from_the_state_dict_equals_never_stopping(settings: BalanceSettings) -> None:
    settings = settings.model_copy(update={"every": 2})
    present_T = all_present(4)

    def run(balancer: Balancer, steps: range) -> list[list[float]]:
        found = []
        for step in steps:
            jacobian_TP = jacobian("random", 4, seed=step)
            gramian_TT = (
                (jacobian_TP @ jacobian_TP.T).float() if balancer.needs_at(step) == "gramian" else None
            )
            weights_T = balancer.weights(
                present_T=present_T, key=(7, step), losses_T=losses(4) / (1 + step), gramian_TT=gramian_TT
            )
            found.append(weights_T.tolist())
        return found

    never_stopped, stopped, resumed = build(settings, 4), build(settings, 4), build(settings, 4)
    expected = run(never_stopped, range(8))
    first = run(stopped, range(5))
    resumed.load_state_dict(stopped.state_dict())
    assert first + run(resumed, range(5, 8)) == expected


# --- each method by its definition --------------------------------------------------------------------

LENGTHS = [(kind, num_tasks) for kind in ("random", "lengths", "agreeing") for num_tasks in (2, 6, 20)]
HARD = [*LENGTHS, *((kind, n) for kind in ("duplicate", "opposite", "dependent") for n in (2, 6, 20))]
independent = pytest.mark.parametrize("case", LENGTHS, ids=lambda case: f"{case[0]} {case[1]}")
hard = pytest.mark.parametrize("case", HARD, ids=lambda case: f"{case[0]} {case[1]}")


@hard
def test_mgda_finds_the_shortest_vector_of_the_hull(case: tuple[str, int]) -> None:
    jacobian_TP = jacobian(*case)
    weights_T = solve(MGDA(), jacobian_TP)
    update_P = weights_T @ jacobian_TP
    assert weights_T.min() >= 0 and weights_T.sum().item() == pytest.approx(1.0, abs=1e-6)
    # A point of the hull is the shortest if no corner is on its near side.
    lengths_T = jacobian_TP.norm(dim=1)
    near_T = jacobian_TP @ update_P - update_P @ update_P
    assert (near_T >= -1e-5 * lengths_T * lengths_T.max()).all()


@hard
@pytest.mark.parametrize("c", [0.0, 0.4, 0.9])
def test_cagrad_stays_in_the_ball_and_helps_the_worst_task_no_less_than_other_points(
    case: tuple[str, int], c: float
) -> None:
    jacobian_TP = jacobian(*case)
    update_P = solve(CAGrad(c=c, rescale=False), jacobian_TP) @ jacobian_TP
    mean_P = jacobian_TP.mean(dim=0)
    radius = c * mean_P.norm()
    assert (update_P - mean_P).norm() <= radius * (1 + 1e-4) + 1e-5 * jacobian_TP.norm(dim=1).max()
    worst = (jacobian_TP @ update_P).min()
    generator = torch.Generator().manual_seed(0)
    aims_NP = torch.randn(2000, len(mean_P), generator=generator, dtype=torch.float64)
    aims_NP[:1000] = (
        torch.rand(1000, len(jacobian_TP), generator=generator, dtype=torch.float64) @ jacobian_TP
    )
    others_NP = mean_P + radius * torch.nn.functional.normalize(aims_NP, dim=1)
    tolerance = (
        1e-5 * jacobian_TP.norm(dim=1).max() * mean_P.norm() + 1e-6 * jacobian_TP.norm(dim=1).max() ** 2
    )
    assert worst >= (jacobian_TP @ others_NP.T).amin(dim=0).max() - tolerance


@independent
def test_imtl_g_projects_equally_onto_every_gradient(case: tuple[str, int]) -> None:
    jacobian_TP = jacobian(*case)
    weights_T = solve(IMTLG(), jacobian_TP)
    projections_T = jacobian_TP @ (weights_T @ jacobian_TP) / jacobian_TP.norm(dim=1)
    assert weights_T.sum().item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(
        projections_T, projections_T.mean().expand_as(projections_T), rtol=1e-4, atol=0
    )


@independent
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation(case: tuple[str, int], alpha: float) -> None:
    jacobian_TP = jacobian(*case)
    weights_T = solve(FairGrad(alpha=alpha), jacobian_TP)
    gains_T = jacobian_TP @ (weights_T @ jacobian_TP)
    # Each gain is a sum of products that the Gramian's float32 and the ridge know to a millionth.
    lengths_T = jacobian_TP.norm(dim=1)
    known_T = 1e-5 * lengths_T * (weights_T * lengths_T).sum()
    assert ((gains_T - weights_T.pow(-1 / alpha)).abs() <= known_T).all()


@independent
def test_nash_gives_every_task_the_same_share_and_bounds_the_update(case: tuple[str, int]) -> None:
    jacobian_TP = jacobian(*case)
    weights_T = solve(Nash(max_norm=0.5), jacobian_TP)
    update_P = weights_T @ jacobian_TP
    shares_T = weights_T * (jacobian_TP @ update_P)
    torch.testing.assert_close(shares_T, shares_T.mean().expand_as(shares_T), rtol=1e-3, atol=0)
    assert update_P.norm().item() == pytest.approx(0.5, rel=1e-4)


@hard
@pytest.mark.parametrize("settings", [UPGrad(), DualProj()], ids=name)
def test_projections_hurt_no_task(settings: BalanceSettings, case: tuple[str, int]) -> None:
    jacobian_TP = jacobian(*case)
    update_P = solve(settings, jacobian_TP) @ jacobian_TP
    lengths_T = jacobian_TP.norm(dim=1)
    assert (jacobian_TP @ update_P >= -1e-4 * lengths_T * lengths_T.max()).all()


@pytest.mark.parametrize("settings", [UPGrad(), DualProj()], ids=name)
def test_projections_leave_gradients_alone_that_do_not_conflict(settings: BalanceSettings) -> None:
    weights_T = solve(settings, jacobian("agreeing", 6).abs())
    torch.testing.assert_close(weights_T, torch.full_like(weights_T, 1 / 6))


def test_pcgrad_leaves_gradients_alone_that_do_not_conflict() -> None:
    weights_T = solve(PCGrad(), jacobian("agreeing", 6).abs())
    torch.testing.assert_close(weights_T, torch.ones_like(weights_T))


def test_pcgrads_orders_come_from_seed_and_step() -> None:
    jacobian_TP = jacobian("random", 6)
    first_T = solve(PCGrad(), jacobian_TP, key=(3, 5))
    assert first_T.tolist() == solve(PCGrad(), jacobian_TP, key=(3, 5)).tolist()
    assert first_T.tolist() != solve(PCGrad(), jacobian_TP, key=(3, 6)).tolist()
    assert first_T.tolist() != solve(PCGrad(), jacobian_TP, key=(4, 5)).tolist()


@independent
def test_aligned_gives_orthogonal_gradients_of_one_length(case: tuple[str, int]) -> None:
    jacobian_TP = jacobian(*case)
    # w = B (1/T, ..., 1/T) with B G B = l_min I, so that |update|^2 = l_min / T.
    weights_T = solve(Aligned(), jacobian_TP)
    gramian_TT = jacobian_TP @ jacobian_TP.T
    update_P = weights_T @ jacobian_TP
    smallest = torch.linalg.eigvalsh(gramian_TT)[0]
    assert update_P.norm().item() == pytest.approx((smallest / len(jacobian_TP)).sqrt().item(), rel=1e-3)


def test_gradnorm_makes_lengths_follow_the_relative_rates() -> None:
    jacobian_TP = jacobian("lengths", 3)
    gramian_TT = (jacobian_TP @ jacobian_TP.T).float()
    balancer = build(GradNorm(alpha=1.5), 3)
    present_T, start_T = all_present(3), torch.tensor([1.0, 2.0, 4.0])
    first_T = balancer.weights(
        present_T=present_T, key=(0, 0), losses_T=start_T, gramian_TT=gramian_TT
    ).double()
    torch.testing.assert_close(
        first_T * jacobian_TP.norm(dim=1), (first_T * jacobian_TP.norm(dim=1)).mean().expand(3)
    )
    now_T = torch.tensor([0.5, 2.0, 1.0])
    later_T = balancer.weights(
        present_T=present_T, key=(0, 1), losses_T=now_T, gramian_TT=gramian_TT
    ).double()
    lengths_T = later_T * jacobian_TP.norm(dim=1)
    torch.testing.assert_close(lengths_T / lengths_T[1], torch.tensor([0.5, 1.0, 0.25]).double().pow(1.5))
    assert later_T.sum().item() == pytest.approx(3.0, rel=1e-6)


# --- scaling one loss -----------------------------------------------------------------------------------

INVARIANT = [
    IMTLG(),
    Nash(),
    FairGrad(alpha=1.0),
    MGDA(normalize="l2"),
    MGDA(normalize="loss"),
]


@pytest.mark.parametrize("settings", INVARIANT, ids=lambda s: f"{s.method}-{name(s)}")
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
@pytest.mark.parametrize("kind", ["random", "agreeing", "duplicate"])
def test_scaling_a_loss_leaves_the_direction_as_it_was(
    settings: BalanceSettings, factor: float, kind: str
) -> None:
    jacobian_TP, losses_T = jacobian(kind, 4), losses(4)
    scaled_TP, scaled_losses_T = jacobian_TP.clone(), losses_T.clone()
    scaled_TP[2] *= factor
    scaled_losses_T[2] *= factor
    updates = []
    for matrix_TP, values_T in [(jacobian_TP, losses_T), (scaled_TP, scaled_losses_T)]:
        weights_T = build(settings, 4).weights(
            present_T=all_present(4),
            key=(0, 0),
            losses_T=values_T,
            gramian_TT=(matrix_TP @ matrix_TP.T).float(),
        )
        updates.append(weights_T.double() @ matrix_TP)
    cosine = torch.nn.functional.cosine_similarity(*updates, dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@every_method
def test_scaling_all_gradients_scales_the_update_as_the_method_defines(
    settings: BalanceSettings, scale: float
) -> None:
    jacobian_TP = jacobian("random", 5)
    straight_P = solve(settings, jacobian_TP) @ jacobian_TP
    scaled_P = solve(settings, scale * jacobian_TP) @ (scale * jacobian_TP)
    cosine = torch.nn.functional.cosine_similarity(straight_P, scaled_P, dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-6)


def test_aligned_reports_once_that_gradients_depend_on_one_another(caplog: pytest.LogCaptureFixture) -> None:
    twice_TP = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    method = Aligned()
    state = method.first_state(3)
    window = Window(torch.ones(3, dtype=torch.bool), (0, 7), torch.ones(3), twice_TP @ twice_TP.T)
    for _ in range(3):
        method.propose(window, state)
    assert [line for line in caplog.messages if "3 tasks have rank 2" in line] == caplog.messages[:1]
    assert len(caplog.messages) == 1
    assert state["num_dependent"] == 3
    caplog.clear()
    method.propose(replace(window, gramian_TT=torch.eye(3)), method.first_state(3))
    assert caplog.messages == []
