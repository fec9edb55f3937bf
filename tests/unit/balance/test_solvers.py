"""The small solvers, by their optimality conditions: no other solver is trusted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mtl_dist.balance import cagrad, solvers
from mtl_dist.balance.solvers import NotConvergedError, angles, nonnegative_qp, power_balance, stationary

SEEDS = range(60)


def gradients(seed: int) -> Tensor:
    """2 to 20 gradients: random, duplicated, opposite, zero, agreeing, of wild lengths, or dependent."""
    generator = torch.Generator().manual_seed(seed)
    num_tasks = int(torch.randint(2, 21, (), generator=generator))
    kind = seed % 7
    num_parameters = max(2, num_tasks // 2) if kind == 6 else 4 * num_tasks
    jacobian_TP = torch.randn(num_tasks, num_parameters, generator=generator, dtype=torch.float64)
    if kind == 1:
        jacobian_TP[1] = jacobian_TP[0]
    elif kind == 2:
        jacobian_TP[1] = -jacobian_TP[0]
    elif kind == 3:
        jacobian_TP[0] = 0
    elif kind == 4:
        jacobian_TP += 0.7
    elif kind == 5:
        jacobian_TP *= torch.exp(3 * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64))
    return jacobian_TP


def dependent_gradients() -> Iterator[Tensor]:
    """40 gradients that span 1 to 39 dimensions, or repeat 2 to 20 vectors with random signs."""
    for rank in range(1, 40):
        generator = torch.Generator().manual_seed(rank)
        yield torch.randn(40, rank, generator=generator, dtype=torch.float64)
    for num_vectors in range(2, 21):
        generator = torch.Generator().manual_seed(num_vectors)
        vectors_NP = torch.randn(num_vectors, 1000, generator=generator, dtype=torch.float64)
        chosen_T = torch.randint(num_vectors, (40,), generator=generator)
        signs_T = torch.randint(2, (40,), generator=generator) * 2 - 1
        yield vectors_NP[chosen_T] * signs_T[:, None]


def float32_gramian(jacobian_TP: Tensor) -> Tensor:
    """As training sees it: rounded, then solved in float64."""
    return (jacobian_TP @ jacobian_TP.T).float().double()


def assert_optimal(matrix_TT: Tensor, linear_NT: Tensor, x_NT: Tensor) -> None:
    slack_NT = x_NT @ matrix_TT + linear_NT
    size_N1 = (linear_NT.abs() + x_NT.abs()).amax(dim=1, keepdim=True)
    assert (x_NT >= 0).all()
    assert (slack_NT >= -1e-12 * size_N1).all()
    assert (x_NT * slack_NT <= 1e-12 * size_N1**2).all()


def test_the_quadratic_program_meets_its_optimality_conditions() -> None:
    for seed in SEEDS:
        cosines_TT = angles(float32_gramian(gradients(seed))).cosines_TT
        for linear_NT in (cosines_TT, -torch.ones_like(cosines_TT[:1])):
            assert_optimal(cosines_TT, linear_NT, nonnegative_qp(cosines_TT, linear_NT))


def test_the_quadratic_program_meets_them_also_where_many_gradients_span_few_dimensions() -> None:
    for jacobian_TP in dependent_gradients():
        cosines_TT = angles(float32_gramian(jacobian_TP)).cosines_TT
        for linear_NT in (cosines_TT, cosines_TT.mean(dim=0, keepdim=True), -torch.ones_like(cosines_TT[:1])):
            assert_optimal(cosines_TT, linear_NT, nonnegative_qp(cosines_TT, linear_NT))


def test_many_problems_are_solved_like_each_alone() -> None:
    for jacobian_TP in dependent_gradients():
        cosines_TT = angles(float32_gramian(jacobian_TP)).cosines_TT
        together_NT = nonnegative_qp(cosines_TT, cosines_TT)
        for q_T, x_T in zip(cosines_TT[::13], together_NT[::13], strict=True):
            alone_T = nonnegative_qp(cosines_TT, q_T[None])[0]
            torch.testing.assert_close(x_T, alone_T, rtol=1e-5, atol=1e-7)


def test_the_path_alone_finds_the_same_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [angles(float32_gramian(gradients(seed))).cosines_TT for seed in SEEDS]
    expected = [nonnegative_qp(cosines_TT, cosines_TT) for cosines_TT in problems]
    monkeypatch.setattr(solvers, "MAX_EXCHANGES", 0)
    for cosines_TT, expected_NT in zip(problems, expected, strict=True):
        found_NT = nonnegative_qp(cosines_TT, cosines_TT)
        assert_optimal(cosines_TT, cosines_TT, found_NT)
        torch.testing.assert_close(found_NT, expected_NT, rtol=1e-5, atol=1e-7)


def test_a_quadratic_program_that_does_not_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "MAX_EXCHANGES", 0)
    monkeypatch.setattr(solvers, "MAX_PIVOTS_PER_TASK", 0)
    monkeypatch.setattr(solvers, "MAX_REPAIRS", 1)
    cosines_TT = angles(float32_gramian(gradients(0))).cosines_TT
    with pytest.raises(NotConvergedError, match="after 1 repairs"):
        nonnegative_qp(cosines_TT, cosines_TT)


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 3.0])
def test_the_power_balance_solves_its_equation(power: float) -> None:
    for seed in SEEDS:
        cosines_TT = angles(float32_gramian(gradients(seed))).cosines_TT
        scale_T = torch.linspace(0.1, 3, len(cosines_TT), dtype=torch.float64)
        x_T = power_balance(cosines_TT, scale_T, power)
        assert (x_T > 0).all()
        rounding = 1e-12 * float(x_T.sum())
        torch.testing.assert_close(cosines_TT @ x_T, scale_T * x_T.pow(-power), rtol=1e-7, atol=rounding)


def test_angles_give_the_gramian_back() -> None:
    for seed in SEEDS:
        gramian_TT = float32_gramian(gradients(seed))
        found = angles(gramian_TT)
        rebuilt_TT = found.cosines_TT * found.lengths_T[:, None] * found.lengths_T[None, :]
        lengths_T = gramian_TT.diagonal().sqrt()
        assert ((rebuilt_TT - gramian_TT).abs() <= 2e-6 * lengths_T[:, None] * lengths_T[None, :]).all()
        assert torch.linalg.eigvalsh(found.cosines_TT)[0] > 0


def test_rounding_that_makes_a_gramian_indefinite_is_repaired() -> None:
    gramian_TT = torch.full((3, 3), 1.0, dtype=torch.float64)
    gramian_TT[0, 1] = gramian_TT[1, 0] = 0.9999
    assert torch.linalg.eigvalsh(gramian_TT)[0] < -1e-5
    assert torch.linalg.eigvalsh(angles(gramian_TT).cosines_TT)[0] > 0


def test_gradients_are_stationary_when_a_convex_combination_of_them_vanishes() -> None:
    star_TP = torch.tensor([[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]], dtype=torch.float64)
    assert stationary(angles(star_TP @ star_TP.T).cosines_TT)
    assert not stationary(angles(star_TP[:2] @ star_TP[:2].T).cosines_TT)


def test_cagrad_finds_its_level_in_two_solves_also_among_dependent_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solves = 0

    def counted(*arguments: Tensor) -> Tensor:
        nonlocal solves
        solves += 1
        return nonnegative_qp(*arguments)

    monkeypatch.setattr(cagrad, "nonnegative_qp", counted)
    for seed, rank in [(1, 8), (2, 5), (3, 5), (0, 20)]:
        generator = torch.Generator().manual_seed(seed)
        rows_TP = torch.randn(40, rank, generator=generator, dtype=torch.float64)
        for shift in (0.0, 0.3):
            cosines_TT = angles(float32_gramian(rows_TP + shift)).cosines_TT
            ones_T = torch.ones(40, dtype=torch.float64)
            solves = 0
            cagrad.worst_case_shift(cosines_TT, ones_T, ones_T / 40, 0.4, torch.inf)
            assert solves <= 2
