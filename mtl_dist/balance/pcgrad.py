"""Projecting conflicting gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from mtl_dist.balance.gradient import GradientMethod, Problem
from mtl_dist.balance.method import generator
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class PCGrad(GradientMethod):
    """Each gradient loses what points against another one (https://arxiv.org/abs/2001.06782).

        g_i <- g_i - (g_i . g_j / |g_j|^2) g_j    for every j, in random order, where g_i . g_j < 0

    and the results are summed. A sum of gradients stays one, so the inner products of G are enough.

    Where we differ: the orders come from (seed, step), the same on all ranks.

    `balance: {method: pcgrad}`
    """

    method: Literal["pcgrad"] = "pcgrad"

    def solve(self, problem: Problem) -> Tensor:
        """See the class."""
        num_tasks = len(problem)
        orders_TT = torch.rand(num_tasks, num_tasks, generator=generator(problem.key, "cpu")).argsort(dim=1)
        # In NumPy, whose small operations cost a third of torch's.
        gramian_TT, others_TT = problem.gramian_TT.numpy(), orders_TT.numpy().T
        squares_T = gramian_TT.diagonal()
        rows_T = np.arange(num_tasks)
        is_other_TT = (others_TT != rows_T) & (squares_T[others_TT] > 0)
        inverses_TT = np.divide(1.0, squares_T[others_TT], out=np.zeros_like(gramian_TT), where=is_other_TT)
        # Row i holds the coefficients of task i's projected gradient; all rows advance together.
        coefficients_TT = np.eye(num_tasks)
        for others_T, inverses_T in zip(others_TT, inverses_TT, strict=True):
            inner_T = np.einsum("ij,ij->i", coefficients_TT, gramian_TT[others_T])
            coefficients_TT[rows_T, others_T] -= np.minimum(inner_T, 0.0) * inverses_T
        return torch.from_numpy(coefficients_TT.sum(axis=0))
