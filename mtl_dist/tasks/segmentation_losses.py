"""The losses of segmentation, each as a part of a sum and of a count per sample.

They see logits (B, C, H, W) at the mask's resolution and masks uint8 (B, H, W) with 255 where no label is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.lazy import F, torch
from mtl_dist.specs import IGNORE, TaskInfo
from mtl_dist.tasks.task import USER_LOSS, Loss, LossSettings
from mtl_dist.tasks.weights import Beta, ClassWeights, LogitAdjustment, adjustments, class_weights

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_LOST = 1e-6


class BoundarySettings(Settings):
    """What pixels near the boundary of two classes weigh: 1 + `weight` x the share of other classes among the
    labelled pixels of the square of `width` around a pixel.

    Of two classes as in https://arxiv.org/abs/1911.11445, whose squares count what lies outside of the image
    as background.
    """

    weight: Annotated[float, Field(gt=0)] = 5.0
    """What a pixel among nothing but other classes would weigh more."""
    width: Annotated[int, Field(ge=3)] = 31
    """Odd, in pixels of the masks that the model sees."""

    @field_validator("width")
    @classmethod
    def _has_a_centre(cls, width: int) -> int:
        if width % 2 == 0:
            raise ValueError(f"expected an odd number of pixels, found {width}. Take {width + 1}.")
        return width


class MapCrossEntropySettings(LossSettings):
    """Cross entropy, averaged over all labelled pixels, as `torch.nn.CrossEntropyLoss` has it.

    With `logit_adjustment` the log-priors of a pixel's class are added to the logits, in the loss alone
    (https://arxiv.org/abs/2007.07314).
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    class_weights: ClassWeights = None
    """What a pixel of each class weighs: a number for each, balanced (by 1 / their number of pixels), or
    effective (by their effective number, https://arxiv.org/abs/1901.05555); null: all the same."""
    beta: Beta = None
    """Of class_weights: effective, which want one: near 1 - 1 / (pixels of a rare class)."""
    logit_adjustment: LogitAdjustment = False
    """true, or tau, the factor of the log-priors."""
    boundary: BoundarySettings | None = None
    """What pixels near boundaries weigh more, times their class weights."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        weights_C = class_weights(self.class_weights, info, where, self.beta)
        added_C = adjustments(self.logit_adjustment, info, f"{where}.logit_adjustment")
        return MapCrossEntropy(len(info.classes), weights_C, added_C, self.boundary)


class MapBceSettings(LossSettings):
    """Binary cross entropy of foreground against background, averaged over all labelled pixels."""

    kind: Literal["bce"] = "bce"
    boundary: BoundarySettings | None = None
    """What pixels near boundaries weigh more."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        require_two_classes(self.kind, info, where)
        return MapBce(self.boundary)


class DiceSettings(LossSettings):
    """Soft Dice, 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s), averaged over classes, then over samples.

    https://arxiv.org/abs/1606.04797, with plain sums in the denominator in place of squares. The sums run
    over the labelled pixels of one sample. Two classes: the foreground alone; more: all classes, the
    background among them. A sample without a labelled pixel does not count.
    """

    kind: Literal["dice"] = "dice"
    smooth: Annotated[float, Field(gt=0)] = 1.0
    """What is added to numerator and denominator, in pixels: so an empty prediction of an empty mask is
    perfect."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Dice(len(info.classes), self.smooth)


class TverskySettings(LossSettings):
    """Tversky's index, 1 - (TP + s) / (TP + `alpha` FP + `beta` FN + s), averaged as Dice is
    (https://arxiv.org/abs/1706.05721); of each class to the power `gamma`: the focal one has 0.75
    (https://arxiv.org/abs/1810.07842)."""

    kind: Literal["tversky"] = "tversky"
    alpha: Annotated[float, Field(ge=0)] = 0.3
    """What a pixel that is wrongly taken for the class counts."""
    beta: Annotated[float, Field(ge=0)] = 0.7
    """What a missed pixel of the class counts."""
    gamma: Annotated[float, Field(gt=0)] = 1.0
    smooth: Annotated[float, Field(gt=0)] = 1.0
    """What is added to numerator and denominator, in pixels."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Tversky(len(info.classes), self.smooth, self.alpha, self.beta, self.gamma)


class JaccardSettings(LossSettings):
    """Soft IoU, 1 - (TP + s) / (TP + FP + FN + s), averaged as Dice is."""

    kind: Literal["jaccard"] = "jaccard"
    smooth: Annotated[float, Field(gt=0)] = 1.0
    """What is added to numerator and denominator, in pixels."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Tversky(len(info.classes), self.smooth, 1.0, 1.0, 1.0)


class LovaszSettings(LossSettings):
    """Lovasz-Softmax, or of two classes Lovasz-Hinge: the convex extension of the IoU of each sample
    (https://arxiv.org/abs/1705.08790), averaged over the classes that are in it, then over samples."""

    kind: Literal["lovasz"] = "lovasz"

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Lovasz(len(info.classes))


class BceDiceSettings(LossSettings):
    """Binary cross entropy, averaged over each sample's labelled pixels, plus its soft Dice."""

    kind: Literal["bce_dice"] = "bce_dice"
    bce_weight: Annotated[float, Field(ge=0)] = 1.0
    """The factor of the cross entropy."""
    dice_weight: Annotated[float, Field(ge=0)] = 1.0
    """The factor of the Dice loss."""
    smooth: Annotated[float, Field(gt=0)] = 1.0
    """What is added to numerator and denominator, in pixels."""
    boundary: BoundarySettings | None = None
    """What pixels near boundaries weigh more in the cross entropy."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        require_two_classes(self.kind, info, where)
        if self.bce_weight == 0 and self.dice_weight == 0:
            raise UserError(
                f"{where}: expected a weight > 0, found both 0. Remove the task to switch it off."
            )
        return BceDice(MapBce(self.boundary), Dice(2, self.smooth), self.bce_weight, self.dice_weight)


SegmentationLoss: TypeAlias = Annotated[
    MapCrossEntropySettings
    | MapBceSettings
    | DiceSettings
    | BceDiceSettings
    | TverskySettings
    | JaccardSettings
    | LovaszSettings,
    Field(discriminator="kind"),
    USER_LOSS,
]


def require_two_classes(kind: str, info: TaskInfo, where: str) -> None:
    """Raise UserError unless the masks have two classes, background and foreground."""
    if len(info.classes) != 2:
        raise UserError(
            f"{where}.kind: expected cross_entropy or dice for masks of {len(info.classes)} classes "
            f"({', '.join(info.classes)}), found {kind}, which is for two classes. Change the loss."
        )


def pixel_weights(target_BHW: Tensor, num_classes: int, boundary: BoundarySettings | None) -> Tensor:
    """What each pixel weighs by where it is, float32 (B, H, W); without a label 0."""
    valid_BHW = target_BHW != IGNORE
    if boundary is None:
        return valid_BHW.float()
    all_BHW = _around(valid_BHW, boundary.width)
    own_BHW = torch.zeros_like(all_BHW)
    # A class after the other: all at once would take as much memory as the logits.
    for number in range(num_classes):
        is_it_BHW = target_BHW == number
        own_BHW = torch.where(is_it_BHW, _around(is_it_BHW, boundary.width), own_BHW)
    shares_BHW = 1 - own_BHW / all_BHW.clamp(min=1)
    return torch.where(valid_BHW, 1 + boundary.weight * shares_BHW, 0.0)


def _around(is_it_BHW: Tensor, width: int) -> Tensor:
    """How many pixels of the square of this width around each are true."""
    counts_B1HW, half = is_it_BHW.float()[:, None], width // 2
    for size, padding in (((width, 1), (half, 0)), ((1, width), (0, half))):
        counts_B1HW = F.avg_pool2d(counts_B1HW, size, 1, padding, divisor_override=1)
    return counts_B1HW[:, 0]


@dataclass(frozen=True, eq=False)
class MapCrossEntropy(Loss):
    num_classes: int
    weights_C: Tensor | None
    added_C: Tensor | None = None
    boundary: BoundarySettings | None = None

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        if self.added_C is not None:
            output = output + self.added_C.to(output.device, non_blocking=True)[:, None, None]
        weights_C = None if self.weights_C is None else self.weights_C.to(output.device, non_blocking=True)
        losses_BHW = F.cross_entropy(output, target.long(), weights_C, ignore_index=IGNORE, reduction="none")
        if self.boundary is not None:
            losses_BHW = losses_BHW * pixel_weights(target, self.num_classes, self.boundary)
        return losses_BHW.sum(dim=(1, 2))

    def denominators(self, target: Tensor) -> Tensor:
        weights_BHW = pixel_weights(target, self.num_classes, self.boundary)
        if self.weights_C is not None:
            classes_BHW = torch.where(target != IGNORE, target, 0).long()
            weights_BHW = weights_BHW * self.weights_C.to(target.device, non_blocking=True)[classes_BHW]
        return weights_BHW.sum(dim=(1, 2))


@dataclass(frozen=True)
class MapBce(Loss):
    boundary: BoundarySettings | None = None

    @property
    def num_outputs(self) -> int:
        return 1

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        losses_BHW = F.binary_cross_entropy_with_logits(output[:, 0], (target == 1).float(), reduction="none")
        return (losses_BHW * pixel_weights(target, 2, self.boundary)).sum(dim=(1, 2))

    def denominators(self, target: Tensor) -> Tensor:
        return pixel_weights(target, 2, self.boundary).sum(dim=(1, 2))


@dataclass(frozen=True)
class Dice(Loss):
    num_classes: int
    smooth: float

    @property
    def num_outputs(self) -> int:
        return 1 if self.num_classes == 2 else self.num_classes

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        """1 - Dice per sample; 0 for a sample without a labelled pixel."""
        p_BCN, true_BCN = _shares(output, target, self.num_classes)
        overlap_BC = torch.where(true_BCN, p_BCN, 0.0).sum(dim=2)
        total_BC = p_BCN.sum(dim=2) + true_BCN.sum(dim=2)
        dice_BC = (2 * overlap_BC + self.smooth) / (total_BC + self.smooth)
        # Over nothing labelled the sums are 0 and the ratio is 1: no loss.
        return 1 - dice_BC.mean(dim=1)

    def denominators(self, target: Tensor) -> Tensor:
        return (target != IGNORE).flatten(1).any(dim=1).float()


@dataclass(frozen=True)
class Tversky(Loss):
    num_classes: int
    smooth: float
    alpha: float
    beta: float
    gamma: float

    @property
    def num_outputs(self) -> int:
        return 1 if self.num_classes == 2 else self.num_classes

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss per sample; 0 for a sample without a labelled pixel."""
        p_BCN, true_BCN = _shares(output, target, self.num_classes)
        hits_BC = torch.where(true_BCN, p_BCN, 0.0).sum(dim=2)
        wrong_BC = torch.where(true_BCN, 0.0, p_BCN).sum(dim=2)
        missed_BC = torch.where(true_BCN, 1 - p_BCN, 0.0).sum(dim=2)
        weighed_BC = self.alpha * wrong_BC + self.beta * missed_BC
        lost_BC = weighed_BC / (hits_BC + weighed_BC + self.smooth)
        # At 0 a power below 1 has no finite slope.
        powered_BC = lost_BC if self.gamma == 1 else lost_BC.clamp(min=_LEAST_LOST) ** self.gamma
        return torch.where(lost_BC > _LEAST_LOST, powered_BC, lost_BC).mean(dim=1)

    def denominators(self, target: Tensor) -> Tensor:
        return (target != IGNORE).flatten(1).any(dim=1).float()


@dataclass(frozen=True)
class Lovasz(Loss):
    num_classes: int

    @property
    def num_outputs(self) -> int:
        return 1 if self.num_classes == 2 else self.num_classes

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss per sample; 0 for a sample without a labelled pixel."""
        valid_B1N = (target != IGNORE).flatten(1)[:, None]
        if self.num_classes == 2:
            true_BCN = (target == 1).flatten(1)[:, None]
            errors_BCN = 1 - output.flatten(2) * torch.where(true_BCN, 1.0, -1.0)
            weights_BC = valid_B1N.any(dim=2).float()
        else:
            p_BCN, true_BCN = _shares(output, target, self.num_classes)
            errors_BCN = torch.where(true_BCN, 1 - p_BCN, p_BCN)
            weights_BC = true_BCN.any(dim=2).float()
        # Pixels without a label come last: behind all others they change no step of the index.
        ordered_BCN, order_BCN = errors_BCN.masked_fill(~valid_B1N, -torch.inf).sort(dim=2, descending=True)
        steps_BCN = _index_steps(true_BCN.gather(2, order_BCN).float())
        losses_BC = (torch.where(ordered_BCN > 0, ordered_BCN, 0.0) * steps_BCN).sum(dim=2)
        return (losses_BC * weights_BC).sum(dim=1) / weights_BC.sum(dim=1).clamp(min=1)

    def denominators(self, target: Tensor) -> Tensor:
        return (target != IGNORE).flatten(1).any(dim=1).float()


def _index_steps(true_BCN: Tensor) -> Tensor:
    """By how much 1 - IoU grows with each further pixel, in this order, that is wrong."""
    total_BC1 = true_BCN.sum(dim=2, keepdim=True)
    left_BCN = total_BC1 - true_BCN.cumsum(dim=2)
    union_BCN = total_BC1 + (1 - true_BCN).cumsum(dim=2)
    index_BCN = 1 - left_BCN / union_BCN
    return torch.diff(index_BCN, dim=2, prepend=torch.zeros_like(index_BCN[..., :1]))


def _shares(output: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """By pixel the probability of each class, and whether it is of it; both nothing without a label.

    Of two classes the foreground is the only one.
    """
    valid_B1N = (target != IGNORE).flatten(1)[:, None]
    if num_classes == 2:
        p_BCN = output.flatten(2).sigmoid()
        classes_C1 = torch.ones(1, 1, dtype=target.dtype, device=target.device)
    else:
        p_BCN = output.flatten(2).softmax(dim=1)
        classes_C1 = torch.arange(num_classes, dtype=target.dtype, device=target.device)[:, None]
    return torch.where(valid_B1N, p_BCN, 0.0), target.flatten(1)[:, None] == classes_C1


@dataclass(frozen=True)
class BceDice(Loss):
    bce: MapBce
    dice: Dice
    bce_weight: float
    dice_weight: float

    @property
    def num_outputs(self) -> int:
        return 1

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        bce_B = self.bce.numerators(output, target) / self.bce.denominators(target).clamp(min=1)
        return self.bce_weight * bce_B + self.dice_weight * self.dice.numerators(output, target)

    def denominators(self, target: Tensor) -> Tensor:
        return self.dice.denominators(target)
