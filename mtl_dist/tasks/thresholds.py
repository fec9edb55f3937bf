"""Where a yes begins: the probability above which a label, or the positive of two classes, is decided.

A number, or a rule by which it is chosen on the validation split, for each label on its own:

    best_f1    the highest F1
    youden     the highest recall + specificity - 1 (Youden, Index for rating diagnostic tests, 1950)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Rule: TypeAlias = Literal["best_f1", "youden"]
Threshold: TypeAlias = Annotated[float, Field(gt=0, lt=1)] | Rule
DEFAULT = 0.5


def log_odds(threshold: float) -> float:
    """What a score is held against: probabilities next to 0.5 round to it, their log-odds do not."""
    return math.log(threshold) - math.log1p(-threshold)


@dataclass(frozen=True)
class Decision:
    """How a class is decided from logits (B, C): the likeliest; of two the positive one above a threshold."""

    num_classes: int
    positive: int | None = None
    threshold: float = DEFAULT

    def log_odds(self, output: Tensor) -> Tensor:
        """How surely it is the positive of two classes, float64 (B,)."""
        assert self.positive is not None
        logits_BC = output.detach().double()
        return logits_BC[:, self.positive] - logits_BC[:, 1 - self.positive]

    def classes(self, output: Tensor) -> Tensor:
        """The class of each sample, int64 (B,)."""
        if self.positive is None:
            return output.argmax(dim=1)
        return torch.where(self.log_odds(output) > log_odds(self.threshold), self.positive, 1 - self.positive)


def choose(rule: Rule, scores_N: Tensor, positive_N: Tensor) -> float:
    """The threshold that is best by `rule`, for scores that are log-odds.

    It lies half-way between two probabilities that occur; of several that are as good it is the one nearest
    to 0.5, which it is also where there is nothing to choose by: no positive, no negative, a NaN.
    """
    positive_N = positive_N.bool().cpu()
    scores_N = scores_N.cpu()
    num_positive = int(positive_N.sum())
    num_negative = positive_N.numel() - num_positive
    if not num_positive or not num_negative or bool(scores_N.isnan().any()):
        return DEFAULT
    values_G, group_N, sizes_G = torch.unique(
        scores_N.double().sigmoid(), return_inverse=True, return_counts=True
    )
    hits_G = torch.zeros_like(sizes_G).index_add_(0, group_N, positive_N.to(sizes_G.dtype))
    # Of cut k the groups from k on are decided as positive; the last cut leaves none.
    zero = torch.zeros(1, dtype=torch.float64)
    hits_K = torch.cat([hits_G.flip(0).cumsum(0).flip(0).double(), zero])
    decided_K = torch.cat([sizes_G.flip(0).cumsum(0).flip(0).double(), zero])
    if rule == "best_f1":
        gain_K = 2 * hits_K / (num_positive + decided_K)
    else:
        gain_K = hits_K / num_positive - (decided_K - hits_K) / num_negative
    below_K, above_K = torch.cat([zero, values_G]), torch.cat([values_G, zero + 1])
    middle_K = (below_K + above_K) / 2
    threshold_K = torch.where(middle_K < above_K, middle_K, below_K)
    gain_K = torch.where((threshold_K > 0) & (threshold_K < 1), gain_K, -math.inf)
    best_K = threshold_K[gain_K == gain_K.max()]
    return float(best_K[(best_K - DEFAULT).abs().argmin()])
