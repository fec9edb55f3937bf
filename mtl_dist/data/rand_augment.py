"""RandAugment on an image and its masks together.

Cubuk et al., RandAugment: practical automated data augmentation with a reduced search space, 2020
(https://arxiv.org/abs/1909.13719): some operations, each drawn from fourteen with equal chances, all of one
magnitude. The operations and their ranges are torchvision's. Where we differ: torchvision 0.29 refuses masks,
here shearing, shifting and turning move them too; pixels are interpolated bilinearly; everything random comes
from the sample's own `Draws`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mtl_dist.config.settings import Settings
from mtl_dist.data.moving import Moving
from mtl_dist.lazy import torch, vision
from mtl_dist.randomness import Draws

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 30
_SHEAR, _SHIFT, _TURN, _CHANGE, _BITS = 0.3, 150 / 331, 30.0, 0.9, 4  # at the largest magnitude


class RandAugmentSettings(Settings):
    """RandAugment: so many operations, so strong."""

    operations: Annotated[int, Field(ge=1, le=14)] = 2
    """How many are drawn for an image."""
    magnitude: Annotated[int, Field(ge=0, le=_LARGEST)] = 9
    """How far each of them goes."""


def rand_augment(moving: Moving, settings: RandAugmentSettings, draws: Draws) -> None:
    """Vary the image and its maps.

    Images that are not 8-bit, or neither grey nor of three colours, have no defined brightness or colour: of
    the fourteen operations those that would change it leave them alone.
    """
    image_CHW = moving.image_CHW
    coloured = image_CHW.dtype == torch.uint8 and len(image_CHW) in (1, 3)
    for _ in range(settings.operations):
        operation = int(draws.uniform(0, 1 + len(_MOVES) + len(_CHANGES)))
        strength = settings.magnitude / _LARGEST
        sign = 1 if draws.uniform() < 0.5 else -1
        if operation < len(_MOVES):
            angle, shift, shear = _MOVES[operation](strength * sign, *moving.image_CHW.shape[-2:])
            moving.move(angle, shift, 1.0, shear)
        elif operation < len(_MOVES) + len(_CHANGES) and coloured:
            moving.image_CHW = _CHANGES[operation - len(_MOVES)](moving.image_CHW, strength, sign)


_Move = tuple[float, list[int], list[float]]  # degrees, shift (x, y) in pixels, shear (x, y) in degrees
_MOVES: tuple[Callable[[float, int, int], _Move], ...] = (
    lambda strength, height, width: (_TURN * strength, [0, 0], [0.0, 0.0]),
    lambda strength, height, width: (0.0, [0, 0], [math.degrees(math.atan(_SHEAR * strength)), 0.0]),
    lambda strength, height, width: (0.0, [0, 0], [0.0, math.degrees(math.atan(_SHEAR * strength))]),
    lambda strength, height, width: (0.0, [round(_SHIFT * strength * width), 0], [0.0, 0.0]),
    lambda strength, height, width: (0.0, [0, round(_SHIFT * strength * height)], [0.0, 0.0]),
)


# Each takes the image, a strength from 0 to 1, and a sign for those that have one.
_CHANGES: tuple[Callable[[Tensor, float, int], Tensor], ...] = (
    lambda image, strength, sign: vision.functional.adjust_brightness(image, 1 + sign * _CHANGE * strength),
    lambda image, strength, sign: vision.functional.adjust_saturation(image, 1 + sign * _CHANGE * strength),
    lambda image, strength, sign: vision.functional.adjust_contrast(image, 1 + sign * _CHANGE * strength),
    lambda image, strength, sign: vision.functional.adjust_sharpness(image, 1 + sign * _CHANGE * strength),
    lambda image, strength, sign: vision.functional.posterize(image, 8 - round(_BITS * strength)),
    lambda image, strength, sign: vision.functional.solarize(image, 255 * (1 - strength)),
    lambda image, strength, sign: vision.functional.autocontrast(image),
    lambda image, strength, sign: vision.functional.equalize(image),
)
