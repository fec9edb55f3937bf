"""Methods from Python: weights for any Gramian or losses, in whatever they are given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import mtl_dist
from mtl_dist import balance
from mtl_dist.balance.gradient import GradientMethod
from mtl_dist.balance.jacobian import JacobianMethod
from mtl_dist.balance.method import Method
from mtl_dist.balance.methods import METHODS, build_balancer
from mtl_dist.errors import UserError

GRADIENTS_TP = np.array([[1.0, 0.0, 0.5], [-0.6, 1.0, 0.0], [0.2, 0.3, 2.0]])
GRAMIAN_TT = GRADIENTS_TP @ GRADIENTS_TP.T


GRAMIAN_METHODS = ("Aligned", "CAGrad", "DualProj", "FairGrad", "MGDA", "Nash", "PCGrad", "UPGrad")


@pytest.mark.parametrize("name", GRAMIAN_METHODS)
def test_arrays_tensors_and_lists_give_the_same_weights(name: str) -> None:
    method = getattr(mtl_dist.balance, name)()
    weights = method.weights(GRAMIAN_TT)
    assert isinstance(weights, np.ndarray) and weights.shape == (3,)
    assert np.isfinite(weights).all()
    for given in (torch.tensor(GRAMIAN_TT), GRAMIAN_TT.tolist()):
        np.testing.assert_array_equal(method.weights(given), weights)


def test_the_update_of_upgrad_hurts_no_task_and_the_mean_does() -> None:
    opposed = np.array([[1.0, -3.0], [-3.0, 25.0]])
    assert (opposed @ np.full(2, 0.5)).min() < 0
    assert (opposed @ mtl_dist.balance.UPGrad().weights(opposed)).min() >= -1e-9


def test_a_method_is_made_with_its_settings() -> None:
    cautious, bold = (mtl_dist.balance.CAGrad(c=c, rescale=False).weights(GRAMIAN_TT) for c in (0.0, 0.9))
    np.testing.assert_allclose(cautious, 1 / 3, rtol=1e-9)
    assert not np.allclose(bold, 1 / 3)


@pytest.mark.parametrize("gramian", [[1.0, 2.0], [[1.0, 0.0]], [[1.0, 5.0], [0.0, 1.0]], [[np.nan]]])
def test_what_is_no_gramian_is_refused(gramian: list[object]) -> None:
    with pytest.raises(UserError, match=r"^gramian: expected a symmetric matrix \(T, T\) of finite numbers"):
        mtl_dist.balance.MGDA().weights(gramian)


def test_a_misspelt_method_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        mtl_dist.balance.CaGrad  # noqa: B018


@pytest.mark.parametrize("method", [m for m in METHODS if not issubclass(m, GradientMethod | JacobianMethod)])
def test_a_method_on_losses_gives_the_weights_of_a_runs_first_window(method: type[Method]) -> None:
    names, losses = ["a", "b", "c"], np.array([0.5, 1.5, 1.0])
    run = build_balancer(method(), names, dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))
    expected_T = run.weights(
        present_T=torch.ones(3, dtype=torch.bool), key=(0, 0), losses_T=torch.from_numpy(losses).float()
    )
    np.testing.assert_allclose(method().weights(losses), expected_T.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: balance.GLS().weights([-1.0, 2.0]), "losses: expected some with a solution"),
        (lambda: balance.STCH().weights([[1.0]]), "losses: expected a row"),
        (lambda: balance.GradDrop().weights([1.0, 2.0]), "weighted sum of the gradients"),
    ],
)
def test_losses_without_weights_are_refused_in_one_line(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
