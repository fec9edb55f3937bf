"""Gradient normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.method import SMALLEST_LOSS, BalancedTasks
from mtl_dist.balance.solvers import angles
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class GradNorm(GradientMethod):
    """Gradients as long as their task is behind (https://arxiv.org/abs/1711.02257).

        w_k |g_k| = c r_k^alpha,    r_k = (L_k / L_k(0)) / mean_j (L_j / L_j(0)),    sum_k w_k = T

    Where we differ: the paper moves w towards this by a gradient step on |w_k |g_k| - c r_k^alpha|; here it
    is solved in closed form, from the diagonal of G, with no second derivative. L_k(0) is the global loss of
    the first window in which the task was present. A task without gradient has weight 0.

    State: `initial_losses_T` (NaN: not seen).

    `balance: {method: gradnorm, alpha: 1.5}`; `alpha` is the pull towards a common rate of training.
    """

    method: Literal["gradnorm"] = "gradnorm"
    alpha: float = Field(default=1.5, ge=0)

    def memory(self, tasks: BalancedTasks) -> dict[str, Tensor]:
        """See the class."""
        return {"initial_losses_T": torch.full((len(tasks),), torch.nan)}

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        kept_T = problem.state["initial_losses_T"]
        initial_T = kept_T.cpu().double()[problem.present_T]
        initial_T = torch.where(initial_T.isfinite(), initial_T, problem.losses_T)
        if problem.losses_T.isfinite().all():
            kept_T[problem.present_T.to(kept_T.device)] = initial_T.float().to(kept_T.device)
        rates_T = problem.losses_T / initial_T.clamp_min(SMALLEST_LOSS)
        rates_T = rates_T / rates_T.mean().clamp_min(SMALLEST_LOSS)
        lengths_T = angles(problem.gramian_TT).lengths_T
        weights_T = torch.where(lengths_T > 0, rates_T.pow(self.alpha) / lengths_T, 0.0)
        total = weights_T.sum()
        return weights_T * (len(problem) / total) if total > 0 else weights_T
