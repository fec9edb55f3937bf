"""The two-objective landscape of the CAGrad and FAMO papers: who gets out of the ravine to the Pareto front.

`toy.py` in Cranial-XIX/CAGrad, `experiments/toy` in Cranial-XIX/FAMO. 100,000 steps of Adam from each start
would take minutes through our solvers, so the descent uses the two-task formulas below in plain floats, and
our balancers are held to them along the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mtl_dist.balance.balancer import Balancer
from mtl_dist.balance.cagrad import CAGrad
from mtl_dist.balance.famo import FAMO
from mtl_dist.balance.method import BalancedTasks

Point = list[float]
Values = tuple[float, float]
Gradients = tuple[Values, Values]
Rule = Callable[[Values, Gradients], Values]

STARTS = [(-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)]
TWO = BalancedTasks(("first", "second"), (0.5, 0.5), (1.0, 1.0))
PRESENT = torch.tensor([True, True])
NUM_STEPS = 100_000


def landscape(x1: float, x2: float) -> tuple[Values, Gradients]:
    """Both objectives and their gradients."""
    tanh = math.tanh(-x2)
    slope = 1 - tanh**2

    def ravine(distance: float, d1: float, d2: float) -> tuple[float, float, float]:
        if abs(distance) < 5e-6:
            return math.log(5e-6) + 6, 0.0, 0.0
        return math.log(abs(distance)) + 6, d1 / distance, d2 / distance

    def bowl(centre: float) -> tuple[float, float, float]:
        return (centre - x1) ** 2 / 10 + (x2 + 8) ** 2 / 100 - 20, (x1 - centre) / 5, (x2 + 8) / 50

    half = math.tanh(x2 / 2)
    above, below = max(half, 0.0), max(-half, 0.0)
    d_above = (1 - half**2) / 2 if half > 0 else 0.0
    d_below = -(1 - half**2) / 2 if half < 0 else 0.0
    values, gradients = [], []
    for (r, r1, r2), (b, b1, b2) in [
        (ravine(0.5 * (-x1 - 7) - tanh, -0.5, slope), bowl(7.0)),
        (ravine(0.5 * (-x1 + 3) + tanh + 2, -0.5, -slope), bowl(-7.0)),
    ]:
        values.append(r * above + b * below)
        gradients.append((r1 * above + b1 * below, r2 * above + r * d_above + b2 * below + b * d_below))
    return (values[0], values[1]), (gradients[0], gradients[1])


def descend(start: Values, rule: Rule, num_steps: int = NUM_STEPS) -> Point:
    """Adam with step 1e-3 on the weighted gradient."""
    x, moment, square = list(start), [0.0, 0.0], [0.0, 0.0]
    for step in range(1, num_steps + 1):
        values, gradients = landscape(x[0], x[1])
        weights = rule(values, gradients)
        for i in (0, 1):
            gradient = weights[0] * gradients[0][i] + weights[1] * gradients[1][i]
            moment[i] = 0.9 * moment[i] + 0.1 * gradient
            square[i] = 0.999 * square[i] + 0.001 * gradient**2
            length = math.sqrt(square[i] / (1 - 0.999**step)) + 1e-8
            x[i] -= 1e-3 * moment[i] / (1 - 0.9**step) / length
    return x


def gramian(gradients: Gradients) -> tuple[float, float, float]:
    (a, b), (c, d) = gradients
    return a * a + b * b, a * c + b * d, c * c + d * d


def cagrad_rule(c: float) -> Rule:
    """CAGrad for two tasks: the dual has one variable u, and sets the derivative of its root to zero."""

    def rule(values: Values, gradients: Gradients) -> Values:
        g11, g12, g22 = gramian(gradients)
        radius = c * 0.5 * math.sqrt(max(g11 + 2 * g12 + g22, 0.0))
        # |g_u|^2 = p u^2 + 2 q u + g22 for g_u = u g1 + (1 - u) g2; g_u . g0 has the slope s in u.
        p, q, s = g11 - 2 * g12 + g22, g12 - g22, (g11 - g22) / 2
        room = p * radius**2 - s**2
        if room > 0:
            u = (-math.copysign(math.sqrt(s * s * max(p * g22 - q * q, 0.0) / room), s) - q) / p
        else:
            u = -math.copysign(math.inf, s)
        u = min(max(u, 0.0), 1.0)
        length = math.sqrt(max(p * u * u + 2 * q * u + g22, 1e-300))
        scale = 1 + c * c
        return (0.5 + radius / length * u) / scale, (0.5 + radius / length * (1 - u)) / scale

    return rule


def famo_rule(settings: FAMO) -> Rule:
    """FAMO for two tasks; the objectives are shifted up by 21, the lower bound of the authors' experiment."""
    logits, moment, square = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    last: list[Values] = []

    def softmax(a: float, b: float) -> Values:
        first = 1 / (1 + math.exp(b - a))
        return first, 1 - first

    def rule(values: Values, gradients: Gradients) -> Values:
        logs = (math.log(values[0] + 21), math.log(values[1] + 21))
        if last:
            z, fall = softmax(*logits), (last[-1][0] - logs[0], last[-1][1] - logs[1])
            mean = z[0] * fall[0] + z[1] * fall[1]
            num_updates = len(last)
            for i in (0, 1):
                gradient = z[i] * (fall[i] - mean) + settings.weight_decay * logits[i]
                moment[i] = 0.9 * moment[i] + 0.1 * gradient
                square[i] = 0.999 * square[i] + 0.001 * gradient**2
                length = math.sqrt(square[i] / (1 - 0.999**num_updates)) + 1e-8
                logits[i] -= settings.lr * moment[i] / (1 - 0.9**num_updates) / length
        last.append(logs)
        return softmax(
            math.log(softmax(*logits)[0]) - logs[0],
            math.log(softmax(*logits)[1]) - logs[1],
        )

    return rule


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_the_balancers_follow_the_formulas_along_the_path(start: Values) -> None:
    settings = FAMO()
    famo, cagrad = Balancer(settings, TWO), Balancer(CAGrad(c=0.4), TWO)
    follow_famo, follow_cagrad = famo_rule(settings), cagrad_rule(0.4)
    step = 0

    def rule(values: Values, gradients: Gradients) -> Values:
        nonlocal step
        losses_T = torch.tensor(values, dtype=torch.float64).add(21).float()
        found_T = famo.weights(present_T=PRESENT, key=(0, step), losses_T=losses_T)
        assert found_T.tolist() == pytest.approx(follow_famo(values, gradients), abs=2e-3)
        weights = follow_cagrad(values, gradients)
        if step % 10 == 0:
            g11, g12, g22 = gramian(gradients)
            gramian_TT = torch.tensor([[g11, g12], [g12, g22]], dtype=torch.float64)
            found_T = cagrad.weights(
                present_T=PRESENT, key=(0, step), losses_T=losses_T, gramian_TT=gramian_TT
            )
            for i in (0, 1):
                update = found_T[0] * gradients[0][i] + found_T[1] * gradients[1][i]
                expected = weights[0] * gradients[0][i] + weights[1] * gradients[1][i]
                assert update.item() == pytest.approx(expected, abs=1e-4 * math.sqrt(g11 + g22))
        step += 1
        return weights

    descend(start, rule, num_steps=1000)
    assert famo.num_unconverged == cagrad.num_unconverged == 0


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("c", [0.4, 0.8])
def test_cagrad_reaches_the_best_mean_on_the_front_from_every_start(start: Values, c: float) -> None:
    x = descend(start, cagrad_rule(c))
    values, _ = landscape(*x)
    assert abs(x[0]) < 0.1 and abs(x[1] + 8.36) < 0.1
    assert values == pytest.approx((-15.09, -15.09), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_famo_reaches_the_front_from_every_start(start: Values) -> None:
    # Without weight decay, as in the authors' run of it: here no batch changes the objectives.
    x = descend(start, famo_rule(FAMO(weight_decay=0.0)))
    assert abs(x[1] + 8.36) < 0.1


@pytest.mark.slow
def test_equal_weights_stay_in_the_ravine_from_two_of_three_starts() -> None:
    ends = [descend(start, lambda values, gradients: (0.5, 0.5)) for start in STARTS]
    assert abs(ends[1][1] + 8.36) < 0.1
    assert ends[0] == pytest.approx([-5.05, 2.15], abs=0.1)
    assert ends[2] == pytest.approx([5.02, 2.33], abs=0.1)
