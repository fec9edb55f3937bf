"""Transforms of `torchvision.transforms.v2` as steps of a recipe, with the promises that all steps keep.

    transforms: [{kind: torchvision.transforms.v2.ColorJitter, brightness: 0.3}]

An image and its maps go through the same draw, which depends on the sample's `Draws` alone; where the view
shows what lies outside the image, a map says "no label". What a transform does with an image's size and
pixels is found by trying it.
"""

from __future__ import annotations

import threading
import warnings
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from mtl_dist.data.transforms import ImageTransform
from mtl_dist.errors import UserError
from mtl_dist.randomness import Draws
from mtl_dist.specs import IGNORE

_TRIES = 16
_INSIDE = "/"  # no task has that name
_generator = threading.Lock()
"""torchvision draws from torch's one generator, which is put back afterwards."""


@dataclass(frozen=True)
class Effect:
    """What a transform does to an image: its size afterwards, whether pixels move, and whether it takes the
    image's maps along."""

    size: tuple[int, int]
    moves: bool
    takes_maps: bool


class LibraryTransform(ImageTransform):
    """A step that is a transform of torchvision's; `where` names it in messages."""

    def __init__(self, transform: v2.Transform, where: str) -> None:
        self.transform = transform
        self.where = where
        self._effects: dict[tuple[int, int], Effect] = {}

    def __call__(
        self, image_CHW: Tensor, masks: dict[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._applied(self.transform, image_CHW, masks, draws)

    def _applied(
        self, transform: v2.Transform, image_CHW: Tensor, maps: dict[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if image_CHW.dtype != torch.uint8:
            raise UserError(
                f"{self.where}: expected 8-bit images, because torchvision takes other numbers for fractions "
                f"of 1, found {image_CHW.dtype}. Write a step of your own, or prepare them with --bits 8."
            )
        if getattr(transform, "inplace", False):
            image_CHW = image_CHW.clone()
        masks = {name: tv_tensors.Mask(mask) for name, mask in maps.items()}
        if masks:
            # Of two numbers no fill is both: where they come out unchanged, the view shows the image.
            inside_211 = torch.tensor([1, 2], dtype=torch.uint8).view(2, 1, 1)
            masks[_INSIDE] = tv_tensors.Mask(inside_211.expand(2, *image_CHW.shape[-2:]))
        with _generator, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*passing through inputs.*")  # as it is to be
            torch.default_generator.manual_seed(int(draws.uniform(0, 2.0**53)))
            image, moved = transform(tv_tensors.Image(image_CHW), masks)
        if isinstance(image, torch.Tensor):
            image = image.as_subclass(torch.Tensor)
        if not masks:
            return image, {}
        plain = {name: mask.as_subclass(torch.Tensor) for name, mask in moved.items()}
        first_HW, second_HW = plain.pop(_INSIDE)
        seen_HW = (first_HW == 1) & (second_HW == 2)
        return image, {name: mask.where(seen_HW, _missing(mask)) for name, mask in plain.items()}

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.effect(size).size

    def effect(self, size: tuple[int, int]) -> Effect:
        """What it does to images of `size`, found on one that is made.

        Raises:
            UserError: it fails, or what it makes is no image of one size, as many channels and 8 bits.
        """
        if size not in self._effects:
            self._effects[size] = self._tried(size)
        return self._effects[size]

    def _tried(self, size: tuple[int, int]) -> Effect:
        try:
            return self._tried_with(size, maps=True)
        except UserError:
            raise
        except Exception:  # whatever torchvision raises at a mask that it does not know what to do with
            pass
        try:
            return self._tried_with(size, maps=False)
        except UserError:
            raise
        except Exception as error:  # whatever torchvision raises at what it cannot read
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{self.where}: expected a transform of one image, found {type(error).__name__}: {reason}. "
                "Remove it."
            ) from error

    def _tried_with(self, size: tuple[int, int], maps: bool) -> Effect:
        image_CHW = torch.arange(3 * size[0] * size[1]).view(3, *size).remainder(251).to(torch.uint8)
        rows_HW, columns_HW = torch.meshgrid(*(torch.arange(1.0, side + 1) for side in size), indexing="ij")
        places = {"places": torch.stack([rows_HW, columns_HW])} if maps else {}
        always = copy(self.transform)
        if hasattr(always, "p"):
            always.p = 1.0  # a rare one acts too
        sizes, moves = set(), not maps
        for number in range(_TRIES):
            transform = always if number % 2 else self.transform
            image, moved = self._applied(transform, image_CHW, places, Draws(number))
            if not isinstance(image, torch.Tensor) or image.dim() != 3:
                raise UserError(
                    f"{self.where}: expected it to return one image, found {type(image).__name__}."
                )
            if len(image) != len(image_CHW) or image.dtype != torch.uint8:
                raise UserError(
                    f"{self.where}: expected it to keep 3 channels of torch.uint8, found {len(image)} of "
                    f"{image.dtype}. Images are normalised by the model."
                )
            sizes.add((image.shape[-2], image.shape[-1]))
            moves = moves or not torch.equal(moved["places"], places["places"])
        if len(sizes) > 1:
            found = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
            raise UserError(f"{self.where}: expected images of one size, found {found}.")
        return Effect(sizes.pop(), moves, maps)


def _missing(map_: Tensor) -> Tensor:
    return torch.tensor(IGNORE if map_.dtype == torch.uint8 else float("nan"), dtype=map_.dtype)
