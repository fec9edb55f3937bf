"""Methods that combine the gradients themselves, by coordinate or over time: they need all of J."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mtl_dist.balance.method import Key, Level, Method, State, Window
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class JacobianMethod(Method):
    """A method whose update is no weighted sum of the tasks' gradients with one weight per task.

    `aggregate` gives the gradient of the shared parameters itself; the root module returns the scalar
    sum(parameter * aggregate) + sum_k (loss_k of the heads on detached features), whose one backward puts it
    there. J must be averaged over ranks first, which is why these methods run on one device and under DDP
    alone. `weights` are 1: each head gets the plain gradient of its own loss.
    """

    needs = "jacobian"

    @property
    def where(self) -> Level:
        return "parameters"

    @property
    def scales_heads(self) -> bool:
        return False

    @abstractmethod
    def aggregate(
        self, jacobian_TP: Tensor, losses_T: Tensor, present_T: Tensor, key: Key, state: State
    ) -> Tensor:
        """The gradient (P,) of the shared parameters, from finite numbers; rows of absent tasks are 0."""

    def weights(self, losses_T: npt.ArrayLike, /, *, step: int = 0) -> npt.NDArray[np.float64]:
        """Refused: the update is not made of weights."""
        raise UserError(
            f"{type(self).__name__}: expected a method whose update is a weighted sum of the gradients, "
            "found one that needs them all. Use it in a recipe, or take another one, such as CAGrad."
        )

    def propose(self, window: Window, state: State) -> Tensor:
        """1 for each task."""
        return torch.ones_like(state["last_weights_T"])
