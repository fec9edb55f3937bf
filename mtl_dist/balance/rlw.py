"""Random loss weighting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mtl_dist.balance.method import Method, State, Window, generator, masked_softmax
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class RLW(Method):
    """New random weights at every step: w = softmax(n), n ~ N(0, 1) (https://arxiv.org/abs/2111.10603).

    Where we differ: the draw comes from (seed, step), the same on all ranks; the softmax is over the tasks
    which are present.

    `balance: {method: rlw}`
    """

    method: Literal["rlw"] = "rlw"

    needs = "nothing"

    def propose(self, window: Window, state: State) -> Tensor:
        """See the class."""
        # Drawn for every task, so that a missing label changes nothing in the draws of the others.
        logits_T = torch.randn(len(window.present_T), generator=generator(window.key, "cpu"))
        return masked_softmax(logits_T.to(window.present_T.device), window.present_T)
