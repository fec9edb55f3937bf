"""Every method that TorchJD has too, on random gradients: 2 to 20 tasks, also singular ones.

Without torchjd (and for some of its methods quadprog, cvxpy with clarabel, ecos) the comparisons are skipped;
what each method promises by its definition is tested in tests/unit/balance in any case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_dist.balance import solvers
from mtl_dist.balance.aligned import Aligned
from mtl_dist.balance.cagrad import CAGrad
from mtl_dist.balance.dualproj import DualProj
from mtl_dist.balance.dwa import DWA
from mtl_dist.balance.fairgrad import FairGrad
from mtl_dist.balance.famo import FAMO
from mtl_dist.balance.gls import GLS
from mtl_dist.balance.graddrop import GradDrop
from mtl_dist.balance.imtl_g import IMTLG
from mtl_dist.balance.imtl_l import IMTLL
from mtl_dist.balance.method import generator
from mtl_dist.balance.methods import BalanceSettings, build_balancer
from mtl_dist.balance.mgda import MGDA
from mtl_dist.balance.nash import Nash
from mtl_dist.balance.pcgrad import PCGrad
from mtl_dist.balance.stch import STCH
from mtl_dist.balance.upgrad import UPGrad

jd = pytest.importorskip("torchjd.aggregation", reason="the oracle, torchjd, is not installed")
scalarization = pytest.importorskip("torchjd.scalarization")

REGULAR = ("random", "agreeing", "unequal")
SINGULAR = ("duplicate", "opposite", "zero", "dependent")
SIZES = (2, 3, 7, 20)


def jacobians(kinds: tuple[str, ...]) -> Iterator[Tensor]:
    for kind in kinds:
        for num_tasks in SIZES:
            for seed in range(3):
                yield jacobian(kind, num_tasks, seed)


def jacobian(kind: str, num_tasks: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * seed + num_tasks)
    num_parameters = 2 if kind == "dependent" else 4 * num_tasks
    jacobian_TP = torch.randn(num_tasks, num_parameters, generator=draw, dtype=torch.float64)
    if kind == "agreeing":
        jacobian_TP += 0.7
    elif kind == "unequal":
        jacobian_TP *= torch.logspace(-1, 1, num_tasks, dtype=torch.float64)[:, None]
    elif kind == "duplicate":
        jacobian_TP[1] = jacobian_TP[0]
    elif kind == "opposite":
        jacobian_TP[1] = -jacobian_TP[0]
    elif kind == "zero":
        jacobian_TP[0] = 0
    return jacobian_TP


def weights(settings: BalanceSettings, jacobian_TP: Tensor) -> Tensor:
    names = [f"task{i}" for i in range(len(jacobian_TP))]
    balancer = build_balancer(settings, names, dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))
    weights_T = balancer.weights(
        present_T=torch.ones(len(names), dtype=torch.bool),
        key=(0, 0),
        losses_T=torch.ones(len(names)),
        gramian_TT=jacobian_TP @ jacobian_TP.T,
    )
    assert balancer.num_unconverged == 0
    return weights_T.double()


def assert_updates_agree(
    settings: BalanceSettings, oracle: Callable[[Tensor], Tensor], kinds: tuple[str, ...], tolerance: float
) -> None:
    """Updates, not weights: where gradients are dependent many weights give the same update."""
    for jacobian_TP in jacobians(kinds):
        found_P = weights(settings, jacobian_TP) @ jacobian_TP
        error = (found_P - oracle(jacobian_TP)).norm() / jacobian_TP.norm(dim=1).mean()
        assert error < tolerance, (settings.method, jacobian_TP.shape)


@pytest.fixture(autouse=True)
def _without_cvxpys_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_aligned_agrees() -> None:
    assert_updates_agree(Aligned(), jd.AlignedMTL(), REGULAR + SINGULAR, 1e-4)


def test_imtl_g_agrees_where_its_equation_has_a_solution() -> None:
    assert_updates_agree(IMTLG(), jd.IMTLG(), (*REGULAR, "duplicate", "opposite", "zero"), 1e-4)


def test_imtl_g_agrees_on_dependent_gradients_of_one_length() -> None:
    for jacobian_TP in jacobians(("dependent",)):
        unit_TP = torch.nn.functional.normalize(jacobian_TP, dim=1)
        torch.testing.assert_close(
            weights(IMTLG(), unit_TP) @ unit_TP, jd.IMTLG()(unit_TP), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_fairgrad_agrees_where_its_equation_has_a_solution(alpha: float) -> None:
    pytest.importorskip("scipy")
    assert_updates_agree(FairGrad(alpha=alpha), jd.FairGrad(alpha), (*REGULAR, "duplicate"), 1e-4)


def test_mgda_is_never_longer_than_frank_wolfes_and_agrees_in_the_limit() -> None:
    for jacobian_TP in jacobians(REGULAR + SINGULAR):
        found_P = weights(MGDA(), jacobian_TP) @ jacobian_TP
        length = jacobian_TP.norm(dim=1).mean()
        assert found_P.norm() <= jd.MGDA(epsilon=1e-3, max_iters=100)(jacobian_TP).norm() + 1e-5 * length
    for jacobian_TP in jacobians(REGULAR):
        if len(jacobian_TP) <= 3:
            expected_P = jd.MGDA(epsilon=1e-7, max_iters=1000)(jacobian_TP)
            found_P = weights(MGDA(), jacobian_TP) @ jacobian_TP
            torch.testing.assert_close(found_P, expected_P, rtol=1e-3, atol=1e-4 * float(jacobian_TP.norm()))


def test_pcgrad_agrees_when_it_takes_the_same_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    def oracle(jacobian_TP: Tensor) -> Tensor:
        num_tasks = len(jacobian_TP)
        orders = iter(torch.rand(num_tasks, num_tasks, generator=generator((0, 0), "cpu")).argsort(dim=1))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda _: next(orders))
            return jd.PCGrad()(jacobian_TP)

    assert_updates_agree(PCGrad(), oracle, REGULAR + SINGULAR, 1e-4)


def test_graddrop_agrees_when_it_takes_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for jacobian_TP in jacobians((*REGULAR, "duplicate", "opposite")):
        names = [f"task{i}" for i in range(len(jacobian_TP))]
        balancer = build_balancer(GradDrop(), names, dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))
        draw_P = torch.rand(jacobian_TP.shape[1:], generator=generator((4, 2), "cpu"))
        found_P = balancer.aggregate(
            jacobian_TP,
            losses_T=torch.ones(len(names)),
            present_T=torch.ones(len(names), dtype=torch.bool),
            key=(4, 2),
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, draw_P=draw_P, **__: draw_P)
            expected_P = jd.GradDrop()(jacobian_TP)
        torch.testing.assert_close(found_P, expected_P)


def projector() -> Any:
    pytest.importorskip("quadprog")
    from torchjd.linalg import QuadprogProjector

    # TorchJD's own ridge, 1e-4 of the sum of all squares, would be most of what is compared.
    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-9)


PROJECTIONS = [(UPGrad(), "UPGrad"), (DualProj(), "DualProj")]
by_projection = pytest.mark.parametrize(("settings", "oracle"), PROJECTIONS, ids=("upgrad", "dualproj"))


@by_projection
def test_projections_agree(settings: BalanceSettings, oracle: str) -> None:
    kinds = (*REGULAR, "duplicate", "opposite", "zero")
    assert_updates_agree(settings, getattr(jd, oracle)(projector=projector()), kinds, 1e-4)


@by_projection
def test_projections_onto_the_thin_cones_of_dependent_gradients_differ_by_our_ridge_alone(
    settings: BalanceSettings, oracle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_updates_agree(settings, getattr(jd, oracle)(projector=projector()), ("dependent",), 1e-2)
    monkeypatch.setattr(solvers, "RIDGE", 1e-9)
    assert_updates_agree(settings, getattr(jd, oracle)(projector=projector()), ("dependent",), 1e-4)


def test_cagrad_agrees_and_helps_the_worst_task_no_less() -> None:
    pytest.importorskip("clarabel")
    oracle = jd.CAGrad(c=0.5, norm_eps=0.0)
    settings = CAGrad(c=0.5, rescale=False)
    assert_updates_agree(settings, oracle, (*REGULAR, "duplicate"), 1e-3)
    for jacobian_TP in jacobians((*REGULAR, "duplicate", "opposite", "dependent")):
        found_P = weights(settings, jacobian_TP) @ jacobian_TP
        lengths_T = jacobian_TP.norm(dim=1)
        worst, oracles = (jacobian_TP @ found_P).min(), (jacobian_TP @ oracle(jacobian_TP)).min()
        assert worst >= oracles - 1e-5 * lengths_T.max() ** 2


def test_nash_agrees_where_the_oracle_reached_its_own_equation() -> None:
    pytest.importorskip("ecos")
    num_compared = 0
    for kind, num_tasks, seed in product((*REGULAR, "duplicate"), (2, 3), range(2)):
        jacobian_TP = jacobian(kind, num_tasks, seed)
        oracle = jd.NashMTL(num_tasks, max_norm=1.0, update_weights_every=1, optim_niter=20)
        expected_P = oracle(jacobian_TP)
        shares_T = oracle.weighting(jacobian_TP) * (jacobian_TP @ expected_P)
        if (shares_T.max() - shares_T.min()) < 1e-4 * shares_T.max():
            found_P = weights(Nash(max_norm=1.0), jacobian_TP) @ jacobian_TP
            torch.testing.assert_close(found_P, expected_P, rtol=1e-3, atol=1e-4)
            num_compared += 1
    assert num_compared > 10


# --- methods on losses ----------------------------------------------------------------------------------


def test_the_methods_on_losses_agree_along_a_falling_path() -> None:
    names = ("a", "b", "c")
    pairs = [
        (GLS(), scalarization.GeometricMean()),
        (STCH(mu=0.3), scalarization.STCH(0.3, weights=torch.ones(3))),
        (DWA(), scalarization.DWA(2.0)),
        (FAMO(), scalarization.FAMO(3, weight_decay=FAMO().weight_decay)),
        (IMTLL(), scalarization.IMTLL(3)),
    ]
    present_T = torch.ones(3, dtype=torch.bool)
    for settings, oracle in pairs:
        balancer = build_balancer(settings, names, dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))
        draw = torch.Generator().manual_seed(0)
        losses_T = torch.rand(3, generator=draw) + 0.5
        for step in range(40):
            weights_T = balancer.weights(present_T=present_T, key=(0, step), losses_T=losses_T)
            differentiable_T = losses_T.clone().requires_grad_()
            (expected_T,) = torch.autograd.grad(oracle(differentiable_T), differentiable_T)
            torch.testing.assert_close(weights_T, expected_T, rtol=1e-4, atol=1e-6, msg=settings.method)
            balancer.observe(losses_T, present_T)
            losses_T = losses_T * (0.9 + 0.1 * torch.rand(3, generator=draw))
            if settings.method == "famo":
                oracle.update(losses_T)
            if settings.method == "dwa" and step % 10 == 9:
                balancer.end_epoch()
                oracle.step()
