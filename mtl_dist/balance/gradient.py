"""Balancers that solve for the weights from the Gramian of the tasks' gradients."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from mtl_dist.balance.balancer import BalancedTasks, Balancer, Key, Level, MethodSettings
from mtl_dist.balance.solvers import NotConvergedError

logger = logging.getLogger(__name__)


class GradientSettings(MethodSettings):
    """What all methods on gradients have in common.

    level        where the gradients are taken: at the shared "parameters", as the papers define the methods,
                 or at the "features" that the heads read, which costs much less but sees no conflict between
                 tasks whose labels lie on different samples
    every        solve every so many steps, and keep the weights in between
    scale_heads  also multiply the heads' gradients by the weights; otherwise each head gets the plain
                 gradient of its own loss
    """

    level: Level = "parameters"
    every: int = Field(default=1, ge=1)
    scale_heads: bool = False


@dataclass(frozen=True)
class Problem:
    """One window's numbers, of the present tasks alone, on the CPU in float64.

    `present_T` says over all tasks which those are; `key` is the source of random choices.
    """

    gramian_TT: Tensor
    losses_T: Tensor
    present_T: Tensor
    key: Key

    def __len__(self) -> int:
        return len(self.gramian_TT)


class GradientBalancer(Balancer):
    """A method that maps the Gramian G = J J^T (and the losses) to weights.

    The solve is in float64 on the CPU: T x T numbers, for which a GPU is slower. Until a first window has
    been solved, the last weights are those of the mean gradient, 1 / T.
    """

    needs = "gramian"

    def __init__(self, settings: GradientSettings, tasks: BalancedTasks) -> None:
        super().__init__(tasks)
        self.level = settings.level
        self.every = settings.every
        self.scale_heads = settings.scale_heads
        self.last_weights_T.fill_(1 / len(tasks))

    @abstractmethod
    def solve(self, problem: Problem) -> Tensor:
        """The weights of the present tasks.

        Raises:
            NotConvergedError: there is no solution, or it was not found.
        """

    def _propose(
        self, *, present_T: Tensor, key: Key, losses_T: Tensor | None, gramian_TT: Tensor | None
    ) -> Tensor:
        if gramian_TT is None:
            assert self.needs_at(key[1]) == "nothing", "a Gramian is needed at this step"
            return self.last_weights_T
        assert losses_T is not None
        present = present_T.cpu()
        chosen = present.nonzero()[:, 0]
        proposed_T = torch.full((len(self.tasks),), torch.nan)
        if len(chosen):
            gramian_TT = gramian_TT.cpu().double()[chosen][:, chosen]
            problem = Problem(gramian_TT, losses_T.cpu().double()[chosen], present, key)
            try:
                if not gramian_TT.isfinite().all():
                    raise NotConvergedError("the gradients are not finite")
                proposed_T[chosen] = self.solve(problem).float()
            except (NotConvergedError, torch.linalg.LinAlgError) as error:
                logger.warning(
                    "balance: step %d: %s found no weights (%s); the last ones are used again.",
                    key[1],
                    type(self).__name__,
                    error,
                )
        return proposed_T.to(present_T.device)
