"""Temperature scaling: logits divided by one number, so that probabilities are as often right as they say.

Guo et al., On calibration of modern neural networks, 2017, https://arxiv.org/abs/1706.04599. It is the number
at which the negative log likelihood of a split's labels is least; that is convex in its inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 100.0
"""Temperatures lie between this and its inverse: of a split whose every answer is right, or no better than
chance, the likelihood has no optimum."""
NUM_BINS = 15
"""The bins of equal width in which the expected calibration error compares probabilities."""
_STEPS = 100
_CLOSE = 1e-10


@dataclass(frozen=True)
class Calibrated:
    """A temperature, and what probabilities are worth without it and with it: `ece`, `nll`, `brier`."""

    temperature: float
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True, eq=False)
class Scores:
    """Logits (N, C) of exclusive classes, with the classes (N,); or of labels that are decided each by
    itself, with whether they are there (N, C)."""

    logits_NC: Tensor
    truths: Tensor

    @classmethod
    def of_two(cls, log_odds_N: Tensor, positive_N: Tensor) -> Scores:
        """Of two classes the log-odds of one."""
        logits_N2 = torch.stack([torch.zeros_like(log_odds_N), log_odds_N], dim=1)
        return cls(logits_N2, positive_N.long())

    @property
    def of_labels(self) -> bool:
        return self.truths.ndim == 2

    def slope(self, inverse: float) -> tuple[float, float]:
        """The first and second derivative of the negative log likelihood by the temperature's inverse."""
        logits_NC = self.logits_NC.double()
        if self.of_labels:
            p_NC = (inverse * logits_NC).sigmoid()
            first = ((p_NC - self.truths.double()) * logits_NC).mean()
            return float(first), float((p_NC * (1 - p_NC) * logits_NC.square()).mean())
        p_NC = (inverse * logits_NC).softmax(dim=1)
        means_N = (p_NC * logits_NC).sum(dim=1)
        own_N = logits_NC.gather(1, self.truths[:, None])[:, 0]
        spread_N = (p_NC * (logits_NC - means_N[:, None]).square()).sum(dim=1)
        return float((means_N - own_N).mean()), float(spread_N.mean())

    def measured(self, temperature: float) -> dict[str, float]:
        """`ece`, `nll` and `brier` of the probabilities at a temperature."""
        logits_NC = self.logits_NC.double() / temperature
        if self.of_labels:
            true_NC = self.truths.double()
            p_NC = logits_NC.sigmoid()
            nll = torch.nn.functional.binary_cross_entropy_with_logits(logits_NC, true_NC)
            brier = (p_NC - true_NC).square().mean()
            says_M, right_M = p_NC.flatten(), true_NC.flatten()
        else:
            logs_NC = logits_NC.log_softmax(dim=1)
            p_NC = logs_NC.exp()
            nll = -logs_NC.gather(1, self.truths[:, None]).mean()
            own_N = p_NC.gather(1, self.truths[:, None])[:, 0]
            brier = (p_NC.square().sum(dim=1) + 1 - 2 * own_N).mean()
            says_M, likeliest_M = p_NC.max(dim=1)
            right_M = (likeliest_M == self.truths).double()
        return {"ece": _calibration_error(says_M, right_M), "nll": float(nll), "brier": float(brier)}


def fitted(scores: Scores) -> float:
    """The temperature at which the labels are likeliest; NaN without labels or with scores that are none."""
    if not len(scores.logits_NC) or not bool(scores.logits_NC.isfinite().all()):
        return math.nan
    low, high, inverse = 1 / LARGEST, LARGEST, 1.0
    for _ in range(_STEPS):
        first, second = scores.slope(inverse)
        low, high = (low, inverse) if first > 0 else (inverse, high)
        step = inverse - first / second if second > 0 else math.nan
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following / inverse - 1) < _CLOSE:
            break
        inverse = following
    return 1 / inverse


def calibrated(scores: Scores, temperature: float | None) -> Calibrated:
    """What probabilities are worth at a temperature; None: at the one that fits these scores."""
    if temperature is None:
        temperature = fitted(scores)
    nothing = dict.fromkeys(("ece", "nll", "brier"), math.nan)
    if math.isnan(temperature) or not len(scores.logits_NC):
        return Calibrated(temperature, nothing, nothing)
    return Calibrated(temperature, scores.measured(1.0), scores.measured(temperature))


def _calibration_error(says_M: Tensor, right_M: Tensor) -> float:
    """As `class_metrics.binned` has the bins."""
    edges = torch.arange(1, NUM_BINS, dtype=torch.float64, device=says_M.device) / NUM_BINS
    bins_M = torch.bucketize(says_M.contiguous(), edges)
    apart = torch.zeros(NUM_BINS, dtype=torch.float64, device=says_M.device)
    apart.index_add_(0, bins_M, says_M - right_M)
    return float(apart.abs().sum() / len(says_M))
