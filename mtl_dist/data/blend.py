"""Mixup and CutMix: pairs of training images, and their labels, blended into one another.

Positions 2k and 2k + 1 of the training stream are a pair. The order is a random one, so they are as good a
pair as any; and as they follow from the position alone, as do the blend's own draws, a sample looks the same
on any number of ranks and workers and in any micro-batch. Where the edge of a batch separates a pair, both
batches read both.

    mixup    a' = lam a + (1 - lam) b      Zhang et al., https://arxiv.org/abs/1710.09412
    cutmix   a' = a, with a rectangle of b's in its place      Yun et al., https://arxiv.org/abs/1905.04899

and b' the same with a and b exchanged; lambda (`lam`), how much of an image is its own, is Beta(alpha, alpha)
as in `torchvision.transforms.v2.MixUp` and `CutMix`, which draw one per batch where we draw one per pair.

A pair is blended only where both samples have labels of the same tasks: so no label is lost, and none is
learnt from a picture that shows only part of what it says. Labels follow the picture: numbers and multilabel
targets are interpolated, masks cut out and pasted like the image. A class cannot be interpolated: the batch
carries the partner's class and lambda, and the loss is lam loss(own) + (1 - lam) loss(partner's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from mtl_dist.config.settings import Settings
from mtl_dist.data.pictures import Box
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.lazy import torch
from mtl_dist.randomness import Draws, derive_key
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

Alpha = Annotated[float, Field(ge=0.01, le=100)]


class BlendSettings(Settings):
    """Blend pairs of training images and their labels.

    Where both ways are stated, each pair takes one of them, as often the one as the other.
    """

    mixup: Alpha | None = None
    """Blend whole images; lambda is Beta(alpha, alpha) distributed. Not for segmentation."""
    cutmix: Alpha | None = None
    """Exchange a rectangle, whose area is distributed so. Not for regression."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The fraction of pairs that are blended; the others stay as they are."""

    @model_validator(mode="after")
    def _one_way_at_least(self) -> BlendSettings:
        if self.mixup is None and self.cutmix is None:
            raise ValueError("expected mixup, cutmix or both, found neither. Example: {mixup: 0.2}.")
        return self


_OTHER = {"mixup": "cutmix", "cutmix": "mixup"}


def check_blend(settings: BlendSettings | None, task_infos: Mapping[str, TaskInfo]) -> None:
    """Refuse to blend the labels of a task that has no blend.

    Raises:
        UserError: one line for each way that does not suit a task.
    """
    problems = []
    for way, other in _OTHER.items():
        unsuitable: dict[tuple[str, str], list[str]] = {}  # by kind and reason
        for name, info in task_infos.items():
            kind = kind_of(info.kind)
            why = kind.against_mixup if way == "mixup" else kind.against_cutmix
            if settings is not None and getattr(settings, way) is not None and why:
                unsuitable.setdefault((kind.name, why), []).append(name)
        problems += [
            f"data.blend.{way}: expected no {kind_name} tasks, found {', '.join(names)}: {why}. "
            f"Remove it, or use {other}."
            for (kind_name, why), names in unsuitable.items()
        ]
    if problems:
        raise UserError("\n".join(problems))


def partnered(task_infos: Mapping[str, TaskInfo]) -> frozenset[str]:
    """The tasks whose labels have no mean, such as classes."""
    kinds = {name: kind_of(info.kind) for name, info in task_infos.items()}
    return frozenset(
        name for name, kind in kinds.items() if isinstance(kind, ScalarKind) and kind.blending == "partner"
    )


def partners_elsewhere(positions: np.ndarray, end: int) -> np.ndarray:
    """Where these positions' pairs have their other half, if that is not among them and before `end`."""
    partners = np.setdiff1d(positions ^ 1, positions)
    return partners[(partners < end) & (partners ^ 1 < end)]


@dataclass(frozen=True)
class Blended:
    """What a blend leaves for the losses to do: `Batch.lam_B` and `Batch.partners`."""

    lam_B: np.ndarray
    partners: dict[str, np.ndarray]


@dataclass(frozen=True)
class Blender:
    """Blends the pairs of a batch in place."""

    settings: BlendSettings
    key: int
    partnered: frozenset[str] = frozenset()
    """The tasks whose labels have no mean: the losses see both."""

    def blend(
        self,
        positions: np.ndarray,
        valid: np.ndarray,
        images_BHWC: Tensor,
        maps: Mapping[str, Tensor],
        targets: Mapping[str, np.ndarray],
        labelled: Mapping[str, np.ndarray],
    ) -> Blended:
        """Blend images, masks and targets of the pairs that are here and both valid.

        `targets` are those that are not maps; those of `partnered` tasks stay, and the partner's come beside.
        """
        lam_B = np.ones(len(positions), dtype=np.float32)
        partners = {name: values.copy() for name, values in targets.items() if name in self.partnered}
        index = {position: i for i, position in enumerate(positions.tolist()) if valid[i]}
        for position, a in index.items():
            b = index.get(position + 1)
            if position % 2 or b is None or any(has[a] != has[b] for has in labelled.values()):
                continue
            draws = Draws(derive_key(self.key, position // 2))
            if draws.uniform() >= self.settings.probability:
                continue
            if self.mixes(draws):
                lam = mix_up(images_BHWC, a, b, draw_beta(self.settings.mixup or 1.0, draws))
            else:
                lam = draw_beta(self.settings.cutmix or 1.0, draws)
                box = cut_box(images_BHWC.shape[1], images_BHWC.shape[2], lam, draws)
                for pixels in (images_BHWC.permute(0, 3, 1, 2), *maps.values()):
                    _exchange(box.of(pixels), a, b)
                lam = 1 - box.height * box.width / (images_BHWC.shape[1] * images_BHWC.shape[2])
            lam_B[a] = lam_B[b] = lam
            for name, values in targets.items():
                if name in partners:
                    partners[name][a], partners[name][b] = values[b], values[a]
                else:
                    own, other = values[a].copy(), values[b].copy()
                    values[a], values[b] = (
                        lam * own + (1 - lam) * other,
                        lam * other + (1 - lam) * own,
                    )
        return Blended(lam_B, partners)

    def mixes(self, draws: Draws) -> bool:
        if self.settings.mixup is None or self.settings.cutmix is None:
            return self.settings.cutmix is None
        return draws.uniform() < 0.5


def mix_up(images_BHWC: Tensor, a: int, b: int, lam: float) -> float:
    """Blend two images, rounded to the nearest value where they are uint8; lambda."""
    # In the batch's dtype, where a sum of bytes may wrap around: so does the difference, back again.
    total = images_BHWC[a] + images_BHWC[b]
    blended = torch.lerp(images_BHWC[b].float(), images_BHWC[a].float(), lam)
    images_BHWC[a] = blended.round_() if images_BHWC.dtype == torch.uint8 else blended
    images_BHWC[b] = total - images_BHWC[a]
    return lam


def cut_box(height: int, width: int, lam: float, draws: Draws) -> Box:
    """The rectangle to exchange for about `1 - lam` of the area: central anywhere, cut off at the edges."""
    x, y = int(draws.uniform(0, width)), int(draws.uniform(0, height))
    half = 0.5 * math.sqrt(1 - lam)
    half_width, half_height = int(half * width), int(half * height)
    left, top = max(0, x - half_width), max(0, y - half_height)
    return Box(top, left, min(height, y + half_height) - top, min(width, x + half_width) - left)


def _exchange(pixels: Tensor, a: int, b: int) -> None:
    kept = pixels[a].clone()
    pixels[a] = pixels[b]
    pixels[b] = kept


def draw_beta(alpha: float, draws: Draws) -> float:
    """A number distributed as Beta(alpha, alpha).

    From 1/2 on by a formula (Ulrich, Computer generation of distributions on the m-sphere, 1984), below by
    rejection (Joehnk, 1964), which takes 1.3 tries at most there.
    """
    if alpha >= 0.5:
        power = 2 / (2 * alpha - 1) if alpha > 0.5 else math.inf
        radius = math.sqrt(1 - draws.uniform() ** power)
        return 0.5 + 0.5 * radius * math.cos(2 * math.pi * draws.uniform())
    while True:
        first, second = draws.uniform() ** (1 / alpha), draws.uniform() ** (1 / alpha)
        if 0 < first + second <= 1:  # both are 0 where the powers underflow
            return first / (first + second)
