"""Methods that solve for the weights from the Gramian of the tasks' gradients."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mtl_dist.balance.method import Key, Level, Method, State, Window, in_float64
from mtl_dist.balance.solvers import NotConvergedError
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One window's numbers, of the present tasks alone, on the CPU in float64.

    `present_T` says over all tasks which those are; `key` is the source of random choices; `state` is what
    the method remembers of all tasks, on its own device.
    """

    gramian_TT: Tensor
    losses_T: Tensor
    present_T: Tensor
    key: Key
    state: State

    def __len__(self) -> int:
        return len(self.gramian_TT)


class GradientMethod(Method):
    """A method that maps the Gramian G = J J^T (and the losses) to weights.

    The solve is in float64 on the CPU: T x T numbers, for which a GPU is slower. Until a first window has
    been solved, the last weights are those of the mean gradient, 1 / T.

    level        where the gradients are taken: at the shared "parameters", as the papers define the methods,
                 or at the "features" that the heads read, which costs much less but sees no conflict between
                 tasks whose labels lie on different samples
    every        solve every so many steps, and keep the weights in between
    scale_heads  also multiply the heads' gradients by the weights; otherwise each head gets the plain
                 gradient of its own loss
    """

    needs = "gramian"

    level: Level = "parameters"
    every: int = Field(default=1, ge=1)
    scale_heads: bool = False

    @property
    def where(self) -> Level:
        return self.level

    @property
    def period(self) -> int:
        return self.every

    @property
    def scales_heads(self) -> bool:
        return self.scale_heads

    def first_weight(self, num_tasks: int) -> float:
        """As in the mean gradient."""
        return 1 / num_tasks

    @abstractmethod
    def solve(self, problem: Problem) -> Tensor:
        """The weights of the present tasks.

        Raises:
            NotConvergedError: there is no solution, or it was not found.
        """

    def weights(
        self, gramian_TT: npt.ArrayLike, /, losses_T: npt.ArrayLike | None = None, step: int = 0
    ) -> npt.NDArray[np.float64]:
        """The weights (T,) for any Gramian (T, T) of gradients: an array, a tensor, nested lists.

        `losses_T` are the tasks' losses for a method that looks at them; ones without it. `step` picks the
        draw of a method with randomness. What a method remembers between windows is as at its beginning.

        Raises:
            UserError: not a symmetric matrix of finite numbers, or one for which the method has no solution.
        """
        gramian = in_float64(gramian_TT)
        num_tasks = len(gramian) if gramian.ndim else 0
        losses = in_float64(np.ones(num_tasks) if losses_T is None else losses_T)
        square = num_tasks > 0 and gramian.shape == (num_tasks, num_tasks)
        if not square or not gramian.isfinite().all() or not torch.allclose(gramian, gramian.T):
            raise UserError(
                f"gramian: expected a symmetric matrix (T, T) of finite numbers, found shape "
                f"{tuple(gramian.shape)}. Give J J^T of the tasks' gradients."
            )
        if losses.shape != (num_tasks,):
            found = tuple(losses.shape)
            raise UserError(f"losses: expected {num_tasks}, found shape {found}. Give one per task.")
        state = self.first_state(num_tasks)
        present = torch.ones(num_tasks, dtype=torch.bool)
        try:
            solution: Tensor = self.solve(Problem(gramian, losses, present, (0, step), state))
        except (NotConvergedError, torch.linalg.LinAlgError) as error:
            raise UserError(f"gramian: expected one with a solution, found none: {error}.") from None
        return np.asarray(solution.double())

    def propose(self, window: Window, state: State) -> Tensor:
        """The solution, or the last weights in a step between two solves."""
        if window.gramian_TT is None:
            assert window.key[1] % self.every, "a Gramian is needed at this step"
            return state["last_weights_T"]
        assert window.losses_T is not None
        present = window.present_T.cpu()
        chosen = present.nonzero()[:, 0]
        proposed_T = torch.full((len(present),), torch.nan)
        if len(chosen):
            gramian_TT = window.gramian_TT.cpu().double()[chosen][:, chosen]
            problem = Problem(gramian_TT, window.losses_T.cpu().double()[chosen], present, window.key, state)
            try:
                if not gramian_TT.isfinite().all():
                    raise NotConvergedError("the gradients are not finite")
                proposed_T[chosen] = self.solve(problem).float()
            except (NotConvergedError, torch.linalg.LinAlgError) as error:
                logger.warning(
                    "balance: step %d: %s found no weights (%s); the last ones are used again.",
                    window.key[1],
                    type(self).__name__,
                    error,
                )
        return proposed_T.to(window.present_T.device)
