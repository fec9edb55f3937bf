"""The contract of a loss: per sample, as numerator and denominator; whoever has all the parts divides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from mtl_dist.config.settings import Settings
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from torch import Tensor


class Loss(ABC):
    """A loss per sample, as numerator and denominator.

    It sees float32 outputs, and never a missing label: those samples come with zero outputs and a harmless
    target (0; an all-ignored mask; NaN throughout a map of numbers), and what it returns for them is dropped.
    """

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """The head's outputs that this loss is made for."""

    @abstractmethod
    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        """Each sample's part of the sum, (B,)."""

    @abstractmethod
    def denominators(self, target: Tensor) -> Tensor:
        """Each sample's part of the count, (B,), from the targets alone."""


class LossSettings(Settings, ABC):
    """One choice of a task's `loss`, which its `kind` names."""

    @abstractmethod
    def build(self, info: TaskInfo, where: str) -> Loss:
        """The loss for a dataset's task; `where` is the path of these settings, for errors.

        Raises:
            UserError: the settings do not fit the dataset.
        """
