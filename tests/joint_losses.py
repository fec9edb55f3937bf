"""Joint losses, as people write them."""

from __future__ import annotations

from torch import Tensor, ones_like

from mtl_dist.tasks.joint import JointLoss


class Agreement(JointLoss):
    """The class and the mean of the mask's probability say the same, for samples that have both labels."""

    def __init__(self, sharpness: float = 1.0) -> None:
        self.sharpness = sharpness

    def numerators(
        self, outputs: dict[str, Tensor], targets: dict[str, Tensor], labelled: dict[str, Tensor]
    ) -> Tensor:
        first = (self.sharpness * outputs["kind"]).softmax(1)[:, 0]
        return (first - outputs["mask"].sigmoid().mean((1, 2, 3))).square() * (1 + targets["kind"])


class Unlabelled(Agreement):
    """The same for every sample, labelled or not."""

    def denominators(self, targets: dict[str, Tensor], labelled: dict[str, Tensor]) -> Tensor:
        return ones_like(labelled["kind"]).float()


class Misshapen(Agreement):
    """One number for all."""

    def numerators(
        self, outputs: dict[str, Tensor], targets: dict[str, Tensor], labelled: dict[str, Tensor]
    ) -> Tensor:
        return super().numerators(outputs, targets, labelled).mean()


class Detached(Agreement):
    """Without a gradient."""

    def numerators(
        self, outputs: dict[str, Tensor], targets: dict[str, Tensor], labelled: dict[str, Tensor]
    ) -> Tensor:
        return super().numerators(outputs, targets, labelled).detach()
