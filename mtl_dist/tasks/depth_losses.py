"""Losses of maps of numbers, in the space in which they are learnt: standardised, perhaps logarithms.

A target without a value is not finite; its pixel, whose output is 0, adds nothing to loss and gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from mtl_dist.lazy import F, torch
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.task import USER_LOSS, Loss, LossSettings

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = (1, 2, 4, 8)

NonNegative = Annotated[float, Field(ge=0)]


class DepthLossSettings(LossSettings):
    """A loss of maps of numbers."""

    logarithms: ClassVar[bool] = False
    """Whether it is one of logarithms, for `space: log` alone."""


class PixelLossSettings(DepthLossSettings):
    """A loss of each pixel, averaged over all pixels that have a value."""

    gradient: NonNegative = 0.0
    """Weight of the gradient-matching term (Li and Snavely, MegaDepth, 2018, https://arxiv.org/abs/1804.00607):
    the absolute differences of the error between neighbours, at distances of 1, 2, 4 and 8 pixels."""


class DepthL1Settings(PixelLossSettings):
    """Absolute error."""

    kind: Literal["l1"] = "l1"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return DepthL1(self.gradient)


class DepthMseSettings(PixelLossSettings):
    """Squared error."""

    kind: Literal["mse"] = "mse"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return DepthMse(self.gradient)


class DepthHuberSettings(PixelLossSettings):
    """Half the squared error up to `delta`, straight beyond, as `torch.nn.HuberLoss` has it."""

    kind: Literal["huber"] = "huber"
    delta: Annotated[float, Field(gt=0)] = 1.0
    """Where it turns, in the space in which is learnt."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return DepthHuber(self.gradient, self.delta)


class DepthBerhuSettings(PixelLossSettings):
    """Absolute error up to a fraction of an image's largest error, squared beyond (Laina et al., Deeper depth
    prediction, 2016, https://arxiv.org/abs/1606.00373, where a batch's largest is taken)."""

    kind: Literal["berhu"] = "berhu"
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Where the error begins to count squared, in parts of the image's largest."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return DepthBerhu(self.gradient, self.share)


class SilogSettings(DepthLossSettings):
    """The scale-invariant error of logarithms d of an image (Eigen et al., Depth map prediction, 2014,
    https://arxiv.org/abs/1406.2283): mean(d^2) - focus mean(d)^2, averaged over the images."""

    logarithms: ClassVar[bool] = True

    kind: Literal["silog"] = "silog"
    focus: Annotated[float, Field(ge=0, le=1)] = 0.5
    """1 forgives any common factor, 0 none."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Silog(self.focus, info.std)


DepthLoss: TypeAlias = Annotated[
    DepthL1Settings | DepthMseSettings | DepthHuberSettings | DepthBerhuSettings | SilogSettings,
    Field(discriminator="kind"),
    USER_LOSS,
]


def errors_of(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Output minus target (B, H, W), 0 where there is no value, and where there is one."""
    valid_BHW = torch.isfinite(target)
    return torch.where(valid_BHW, output[:, 0] - torch.where(valid_BHW, target, 0.0), 0.0), valid_BHW


@dataclass(frozen=True)
class PixelLoss(Loss):
    """A loss of each pixel's error, and of its differences between neighbours."""

    gradient: float

    @property
    def num_outputs(self) -> int:
        return 1

    @abstractmethod
    def pixels(self, errors_BHW: Tensor) -> Tensor:
        """The loss of each pixel; of an error of 0 it is 0."""

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        errors_BHW, valid_BHW = errors_of(output, target)
        sums_B = self.pixels(errors_BHW).sum(dim=(1, 2))
        if self.gradient:
            sums_B = sums_B + self.gradient * _differences(errors_BHW, valid_BHW)
        return sums_B

    def denominators(self, target: Tensor) -> Tensor:
        return torch.isfinite(target).sum(dim=(1, 2), dtype=torch.float32)


class DepthL1(PixelLoss):
    def pixels(self, errors_BHW: Tensor) -> Tensor:
        return errors_BHW.abs()


class DepthMse(PixelLoss):
    def pixels(self, errors_BHW: Tensor) -> Tensor:
        return errors_BHW.square()


@dataclass(frozen=True)
class DepthHuber(PixelLoss):
    delta: float

    def pixels(self, errors_BHW: Tensor) -> Tensor:
        return F.huber_loss(errors_BHW, torch.zeros_like(errors_BHW), reduction="none", delta=self.delta)


@dataclass(frozen=True)
class DepthBerhu(PixelLoss):
    share: float

    def pixels(self, errors_BHW: Tensor) -> Tensor:
        sizes_BHW = errors_BHW.abs()
        turn_B11 = (self.share * sizes_BHW.detach().amax(dim=(1, 2), keepdim=True)).clamp(min=1e-6)
        squared_BHW = (sizes_BHW.square() + turn_B11.square()) / (2 * turn_B11)
        return torch.where(sizes_BHW <= turn_B11, sizes_BHW, squared_BHW)


@dataclass(frozen=True)
class Silog(Loss):
    focus: float
    scale: float
    """What an output of 1 is in logarithms."""

    @property
    def num_outputs(self) -> int:
        return 1

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        errors_BHW, valid_BHW = errors_of(output, target)
        errors_BHW = errors_BHW * self.scale
        num_B = valid_BHW.sum(dim=(1, 2)).clamp(min=1)
        means_B = errors_BHW.sum(dim=(1, 2)) / num_B
        return errors_BHW.square().sum(dim=(1, 2)) / num_B - self.focus * means_B.square()

    def denominators(self, target: Tensor) -> Tensor:
        return torch.isfinite(target).flatten(1).any(dim=1).float()


def _differences(errors_BHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Each image's sum of absolute differences between neighbours that both have a value, (B,); at each
    distance as if there were as many pairs as pixels."""
    total_B = errors_BHW.new_zeros(len(errors_BHW))
    for scale in _SCALES:
        errors, valid = errors_BHW[:, ::scale, ::scale], valid_BHW[:, ::scale, ::scale]
        across = (errors[:, :, 1:] - errors[:, :, :-1]).abs() * (valid[:, :, 1:] & valid[:, :, :-1])
        down = (errors[:, 1:] - errors[:, :-1]).abs() * (valid[:, 1:] & valid[:, :-1])
        total_B = total_B + scale**2 * (across.sum(dim=(1, 2)) + down.sum(dim=(1, 2)))
    return total_B
