"""Metrics of an order: how well scores put the positives before the negatives.

Exact, with ties counted half, from scores of any scale: only their order matters. torchmetrics' own functions
squash scores outside of [0, 1] by a float32 sigmoid or softmax, in which confident scores tie, and count a
class without a positive as an AUROC of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def auroc(scores_N: Tensor, positive_N: Tensor) -> float:
    """The chance that a random positive scores above a random negative (Mann-Whitney U / number of pairs).

    NaN without a positive, without a negative or with a NaN among the scores. Sorts: O(N log N).
    """
    positive_N = positive_N.bool()
    num_positive = int(positive_N.sum())
    num_negative = positive_N.numel() - num_positive
    if num_positive == 0 or num_negative == 0 or bool(scores_N.isnan().any()):
        return math.nan
    _, group_N, sizes_G = torch.unique(scores_N, return_inverse=True, return_counts=True)
    middle_ranks_G = sizes_G.cumsum(0).double() - (sizes_G - 1) / 2
    rank_sum = float(middle_ranks_G[group_N[positive_N]].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def average_precision(scores_N: Tensor, positive_N: Tensor) -> float:
    """The area under the precision-recall steps, sum over thresholds of (R_n - R_{n-1}) P_n.

    NaN without a positive or with a NaN among the scores.
    """
    positive_N = positive_N.bool()
    num_positive = int(positive_N.sum())
    if num_positive == 0 or bool(scores_N.isnan().any()):
        return math.nan
    _, group_N, sizes_G = torch.unique(scores_N, return_inverse=True, return_counts=True)
    hits_G = torch.zeros_like(sizes_G).index_add_(0, group_N, positive_N.to(sizes_G.dtype))
    precision_G = hits_G.flip(0).cumsum(0).double() / sizes_G.flip(0).cumsum(0)
    return float((precision_G * hits_G.flip(0)).sum()) / num_positive
