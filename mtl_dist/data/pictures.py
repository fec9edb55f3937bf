"""Boxes of pixels, and pictures of which a box can be shown in another size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from mtl_dist.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


Resizing: TypeAlias = "Callable[[], Tensor]"
"""What is left to be done when the pixels are there: returns them resized, (C, H, W)."""


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """The part of an image (..., H, W) inside the box, as a view."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


class Picture(ABC):
    """An image that need not be decoded yet."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width."""

    @abstractmethod
    def decode(self, box: Box, size: tuple[int, int]) -> Resizing:
        """Decode what lies in the box; what is returned resizes it, with antialiasing, to (C, *size).

        Raises:
            UnreadableImage: the image is damaged.
        """

    def show(self, box: Box, size: tuple[int, int]) -> Tensor:
        """Both at once."""
        return self.decode(box, size)()


@dataclass(frozen=True)
class DecodedPicture(Picture):
    """A picture whose pixels are there."""

    image_CHW: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.image_CHW.shape[-2], self.image_CHW.shape[-1]

    def decode(self, box: Box, size: tuple[int, int]) -> Resizing:
        return partial(resized, box.of(self.image_CHW), size, "bilinear")


def resized(image: Tensor, size: tuple[int, int], mode: Literal["bilinear", "nearest-exact"]) -> Tensor:
    """An image (C, H, W) in another size; bilinear is antialiased."""
    if image.shape[-2:] == size:
        return image
    if mode == "bilinear" and image.dtype == torch.uint8 and size[1] == 1:
        # torch 2.15's kernel for uint8 returns wrong values, or fails, for a single column.
        return resized(image.float(), size, mode).round().to(torch.uint8)
    # torch resizes contiguous channels-last images fastest, and then returns such: half the time of a view.
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size, mode=mode, antialias=mode == "bilinear")[0]
