"""Geometric loss strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.method import SMALLEST_LOSS, Method, State, Window
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class GLS(Method):
    """The geometric mean of the losses: (prod L_k)^(1/T) (MultiNet++, https://arxiv.org/abs/1904.08492).

    As weights: w_k = (prod L_j)^(1/T) / (T L_k), whose weighted sum is the geometric mean itself.

    Where we differ: the mean is over the present tasks, of global losses: on several ranks the product of
    means is not the mean of products. A negative loss has no geometric mean: the last weights are used.

    `balance: {method: gls}`
    """

    method: Literal["gls"] = "gls"

    needs = "losses"

    def propose(self, window: Window, state: State) -> Tensor:
        """See the class."""
        present_T, losses_T = window.present_T, window.losses_T
        assert losses_T is not None
        # Below zero the logarithm is NaN, which says "no solution".
        safe_T = torch.where(losses_T < 0, losses_T, losses_T.clamp_min(SMALLEST_LOSS))
        logs_T = torch.where(present_T, safe_T.log(), 0.0)
        num_present = present_T.sum()
        return (logs_T.sum() / num_present - logs_T).exp() / num_present
