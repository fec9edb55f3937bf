"""The losses of segmentation, each as a part of a sum and of a count per sample.

They see logits (B, C, H, W) at the mask's resolution and masks uint8 (B, H, W) with 255 where no label is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from mtl_dist.errors import UserError
from mtl_dist.lazy import F, torch
from mtl_dist.specs import IGNORE, TaskInfo
from mtl_dist.tasks.task import USER_LOSS, Loss, LossSettings
from mtl_dist.tasks.weights import ClassWeights, class_weights

if TYPE_CHECKING:
    from torch import Tensor


class MapCrossEntropySettings(LossSettings):
    """Cross entropy, averaged over all labelled pixels, as `torch.nn.CrossEntropyLoss` has it."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    class_weights: ClassWeights = None

    def build(self, info: TaskInfo, where: str) -> Loss:
        weights_C = class_weights(self.class_weights, info, f"{where}.class_weights")
        return MapCrossEntropy(len(info.classes), weights_C)


class MapBceSettings(LossSettings):
    """Binary cross entropy of foreground against background, averaged over all labelled pixels."""

    kind: Literal["bce"] = "bce"

    def build(self, info: TaskInfo, where: str) -> Loss:
        require_two_classes(self.kind, info, where)
        return MapBce()


class DiceSettings(LossSettings):
    """Soft Dice, 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s), averaged over classes, then over samples.

    https://arxiv.org/abs/1606.04797, with plain sums in the denominator in place of squares. The sums run
    over the labelled pixels of one sample. Two classes: the foreground alone; more: all classes, the
    background among them. A sample without a labelled pixel does not count.
    """

    kind: Literal["dice"] = "dice"
    smooth: Annotated[float, Field(gt=0)] = 1.0
    """s, in pixels: it makes an empty prediction of an empty mask perfect."""

    def build(self, info: TaskInfo, where: str) -> Loss:
        return Dice(len(info.classes), self.smooth)


class BceDiceSettings(LossSettings):
    """Binary cross entropy, averaged over each sample's labelled pixels, plus its soft Dice."""

    kind: Literal["bce_dice"] = "bce_dice"
    bce_weight: Annotated[float, Field(ge=0)] = 1.0
    dice_weight: Annotated[float, Field(ge=0)] = 1.0
    smooth: Annotated[float, Field(gt=0)] = 1.0

    def build(self, info: TaskInfo, where: str) -> Loss:
        require_two_classes(self.kind, info, where)
        if self.bce_weight == 0 and self.dice_weight == 0:
            raise UserError(
                f"{where}: expected a weight > 0, found both 0. Remove the task to switch it off."
            )
        return BceDice(MapBce(), Dice(2, self.smooth), self.bce_weight, self.dice_weight)


SegmentationLoss: TypeAlias = Annotated[
    MapCrossEntropySettings | MapBceSettings | DiceSettings | BceDiceSettings,
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


@dataclass(frozen=True, eq=False)
class MapCrossEntropy(Loss):
    num_classes: int
    weights_C: Tensor | None

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        weights_C = None if self.weights_C is None else self.weights_C.to(output.device, non_blocking=True)
        losses_BHW = F.cross_entropy(output, target.long(), weights_C, ignore_index=IGNORE, reduction="none")
        return losses_BHW.sum(dim=(1, 2))

    def denominators(self, target: Tensor) -> Tensor:
        valid_BHW = target != IGNORE
        if self.weights_C is None:
            return valid_BHW.sum(dim=(1, 2), dtype=torch.float32)
        classes_BHW = torch.where(valid_BHW, target, 0).long()
        weights_BHW = self.weights_C.to(target.device, non_blocking=True)[classes_BHW]
        return torch.where(valid_BHW, weights_BHW, 0.0).sum(dim=(1, 2))


@dataclass(frozen=True)
class MapBce(Loss):
    @property
    def num_outputs(self) -> int:
        return 1

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        losses_BHW = F.binary_cross_entropy_with_logits(output[:, 0], (target == 1).float(), reduction="none")
        return torch.where(target != IGNORE, losses_BHW, 0.0).sum(dim=(1, 2))

    def denominators(self, target: Tensor) -> Tensor:
        return (target != IGNORE).sum(dim=(1, 2), dtype=torch.float32)


@dataclass(frozen=True)
class Dice(Loss):
    num_classes: int
    smooth: float

    @property
    def num_outputs(self) -> int:
        return 1 if self.num_classes == 2 else self.num_classes

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        """1 - Dice per sample; 0 for a sample without a labelled pixel."""
        valid_B1N = (target != IGNORE).flatten(1)[:, None]
        if self.num_classes == 2:
            p_BCN = output.flatten(2).sigmoid()
            classes_C1 = torch.ones(1, 1, dtype=target.dtype, device=target.device)
        else:
            p_BCN = output.flatten(2).softmax(dim=1)
            classes_C1 = torch.arange(self.num_classes, dtype=target.dtype, device=target.device)[:, None]
        p_BCN = torch.where(valid_B1N, p_BCN, 0.0)
        true_BCN = target.flatten(1)[:, None] == classes_C1
        overlap_BC = torch.where(true_BCN, p_BCN, 0.0).sum(dim=2)
        total_BC = p_BCN.sum(dim=2) + true_BCN.sum(dim=2)
        dice_BC = (2 * overlap_BC + self.smooth) / (total_BC + self.smooth)
        # Over nothing labelled the sums are 0 and the ratio is 1: no loss.
        return 1 - dice_BC.mean(dim=1)

    def denominators(self, target: Tensor) -> Tensor:
        return (target != IGNORE).flatten(1).any(dim=1).float()


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
