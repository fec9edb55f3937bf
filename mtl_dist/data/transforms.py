"""From a decoded image and its masks to the size and the view that a batch wants.

An image and its maps go through the same geometry: a box of the source is resized (antialiased for the
image; a map's pixel takes the value of the nearest one, so that no value appears that is in no pixel), then
flipped, then turned. Where the view shows what lies outside the image, the image is black and a map says "no
label", in the value of its kind. Everything random comes from the `Draws` that the caller passes, so
that a sample's view depends on (seed, epoch, sample) alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from mtl_dist.config.settings import Settings
from mtl_dist.data.boxes import box_of, edges_in, shown_box
from mtl_dist.data.moving import Affine, Moving
from mtl_dist.data.pictures import Box, DecodedPicture, Picture, Resizing, resized
from mtl_dist.data.rand_augment import RandAugmentSettings, rand_augment
from mtl_dist.errors import UserError
from mtl_dist.kinds.view import View
from mtl_dist.lazy import F, torch, vision
from mtl_dist.randomness import Draws
from mtl_dist.specs import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

Whole = Annotated[int, Field(ge=1)]
Preset = Literal["none", "standard", "strong"]

_CROP_TRIES = 10
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG and torchvision have it

Share = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0, lt=1)]


class AugmentSettings(Settings):
    """How a training image is varied; what is not stated is left alone."""

    crop_scale: tuple[Share, Share] = (1.0, 1.0)
    """Area of a random crop, as shares of the image's; no crop for (1, 1)."""
    crop_ratio: tuple[Factor, Factor] = (0.75, 4 / 3)
    """Width over height of a random crop."""
    flip: bool = False
    """Mirror half of the images, left to right."""
    flip_vertical: bool = False
    """Turn half of the images upside down."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turn by up to this many degrees, either way."""
    translate: Strength = 0.0
    """Shift by up to this fraction of the size, in each direction."""
    zoom: tuple[Factor, Factor] = (1.0, 1.0)
    """Enlarge about the centre by a factor between these."""
    brightness: Strength = 0.0
    """Multiply the values by 1 plus or minus up to this."""
    contrast: Strength = 0.0
    """Multiply the distance from the mean by 1 plus or minus up to this."""
    saturation: Strength = 0.0
    """Multiply the distance from grey by 1 plus or minus up to this; images of three channels only."""
    rand_augment: RandAugmentSettings | None = None
    """Operations drawn at random, such as turning, shearing, sharpening, equalising; masks move along."""
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of painting a rectangle of the image in its mean colour; masks stay."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> AugmentSettings:
        for name in ("crop_scale", "crop_ratio", "zoom"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: expected the smaller number first, found [{low:g}, {high:g}].")
        return self


PRESETS: dict[Preset, AugmentSettings] = {
    "none": AugmentSettings(),
    "standard": AugmentSettings(crop_scale=(0.5, 1.0), flip=True),
    "strong": AugmentSettings(
        crop_scale=(0.25, 1.0),
        flip=True,
        rand_augment=RandAugmentSettings(),
        erase=0.25,
    ),
}


class CentreCrop(Settings):
    """The image resized until its short side is `short_side`, and the middle of it cut out: torchvision's
    Resize(short_side) and CenterCrop(crop) of tensors, to the bit; of Pillow's images its own resizing rounds
    otherwise, by 1 of 255.

    short_side     what it is resized to
    crop           what is cut out, a side or height and width: it is `data.image_size` where it is stated
    crop_fraction  in place of `short_side`: the fraction of it that is cut out, 0.875 for 224 of 256
    """

    short_side: Whole | None = None
    crop: Whole | tuple[Whole, Whole] | None = None
    crop_fraction: Share | None = None

    @model_validator(mode="after")
    def _one_size(self) -> CentreCrop:
        if (self.short_side is None) == (self.crop_fraction is None):
            found = "neither" if self.short_side is None else "both"
            raise ValueError(f"expected short_side or crop_fraction, found {found}. State one.")
        return self

    def problem(self, size: tuple[int, int]) -> str:
        """Why no image of `size` can be cut out; empty where it can."""
        crop = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        if crop is not None and crop != size:
            return (
                f"resize.crop: expected data.image_size, {_words(size)}, found {_words(crop)}. Leave it out."
            )
        if self.shorter(size) < max(size):
            return (
                f"resize.short_side: expected {max(size)} or more, which an image of {_words(size)} is cut "
                f"from, found {self.short_side}."
            )
        return ""

    def shorter(self, size: tuple[int, int]) -> int:
        """The resized image's short side."""
        return self.short_side or math.floor(max(size) / (self.crop_fraction or 1.0))

    def resized(self, height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the resized image, rounded as torchvision does."""
        short = self.shorter(size)
        long = int(short * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)


def _words(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


Resize: TypeAlias = Literal["stretch", "crop", "pad"] | CentreCrop


class ImageTransform(ABC):
    """A step of the user's after the built-in ones, on an image and its maps of `data.image_size`.

    `training_only` says whether evaluation and prediction leave it out. One that they don't must not move
    pixels: predicted masks are those of the image as it came.
    """

    training_only: ClassVar[bool] = True

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what it returns for images of `size`: the same, unless it says otherwise."""
        return size

    @abstractmethod
    def __call__(
        self, image_CHW: Tensor, masks: dict[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The image, of unchanged dtype and channels, and the maps in its size: masks (H, W, uint8;
        255 = ignore), numbers (H, W) and vectors (C, H, W) of float32, NaN where there is no label.

        Labels whose values change with the view (normals, metric depth) do not hear of what it does.
        Everything random must come from `draws`, so that a sample's view is the same on every machine.
        """


class BatchTransform(ABC):
    """A step of the user's on the images of a micro-batch together, after all others, in training alone.

    It sees no label, and must leave pixels where they are: a label is of what was there before.
    """

    @abstractmethod
    def __call__(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        """The images, of unchanged shape and dtype.

        What is random must come from `draws`, which follow from the position of the first of them: a resumed
        run sees the same. Another number of ranks makes other micro-batches.
        """


@dataclass(frozen=True)
class Transform:
    """The way from a decoded image and its maps to `size` (height, width), and on by steps of the user's.

    `fills` is what each task's map says where there is no label; a mask's 255 where it is not stated.
    """

    size: tuple[int, int]
    resize: Resize
    augment: AugmentSettings
    own: tuple[ImageTransform, ...] = ()
    fills: Mapping[str, float] = field(default_factory=dict)

    def __call__(
        self, image_CHW: Tensor, masks: Mapping[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The image (C, H, W) and the maps (H, W) or (C, H, W) in their new size, and of unchanged dtype."""
        return self.view(DecodedPicture(image_CHW), masks, draws)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return size_after(self.own, self.size)

    @property
    def shows_whole(self) -> bool:
        """Whether a view that is not augmented shows all of an image, and its maps as they are stored."""
        return self.resize in ("stretch", "pad") and not self.own

    def keeps(self, size: tuple[int, int]) -> bool:
        """Whether every image of this size stays as it is."""
        plain = self.augment == PRESETS["none"] and not self.own
        return plain and size == self.size and self.inner_size(Box(0, 0, *size)) == size

    def view(
        self, picture: Picture, masks: Mapping[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for an image that need not be decoded yet.

        Raises:
            UnreadableImage: the image is damaged.
        """
        image_CHW, views, _ = self.view_with_boxes(picture, masks, {}, draws)
        return image_CHW, views

    def view_with_boxes(
        self,
        picture: Picture,
        masks: Mapping[str, Tensor],
        boxes: Mapping[str, Sequence[float]],
        draws: Draws,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
        """The same with boxes: left, top, right and bottom in pixels; those that are seen come back."""
        source = self.source(picture.size, draws)
        resizing = self.decode(picture, source)
        return self.finish(resizing, source, picture.size, masks, boxes, draws)[:3]

    def source(self, size: tuple[int, int], draws: Draws) -> Box:
        """The first step: the part to show of an image of this size."""
        height, width = size
        if self.augment.crop_scale != (1.0, 1.0):
            return _random_box(height, width, self.augment.crop_scale, self.augment.crop_ratio, draws)
        if self.resize != "crop":
            return Box(0, 0, height, width)
        scale = min(height / self.size[0], width / self.size[1])
        box_height, box_width = max(1, round(self.size[0] * scale)), max(1, round(self.size[1] * scale))
        return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)

    def decode(self, picture: Picture, source: Box) -> Resizing:
        """The second step: decode that part.

        Raises:
            UnreadableImage: the image is damaged.
        """
        if not isinstance(self.resize, CentreCrop):
            return picture.decode(source, self.inner_size(source))
        # In its own size first: a decoder that shrinks on the way gives other pixels than torchvision has.
        whole, size = picture.decode(source, (source.height, source.width)), self.inner_size(source)
        return lambda: resized(whole(), size, "bilinear")

    def finish(
        self,
        resizing: Resizing,
        source: Box,
        size: tuple[int, int],
        masks: Mapping[str, Tensor],
        boxes: Mapping[str, Sequence[float]],
        draws: Draws,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]], Callable[[], View]]:
        """The last step: all that follows, on the decoded part `source` of an image of this `size`.

        What comes last returns the view that was taken, by which labels move that are no pixels: few want it.
        """
        inner = self.inner_size(source)
        path, mirrored = self._shown(source), False
        image_CHW = resizing()
        flat = [name for name, mask in masks.items() if mask.dim() == 2]
        views = {
            name: resized(source.of(mask[None] if name in flat else mask), inner, "nearest-exact")
            for name, mask in masks.items()
        }
        if inner != self.size:
            image_CHW = _padded(image_CHW, self.size, 0)
            views = {name: _padded(mask, self.size, self._fill(name)) for name, mask in views.items()}
        for name, edges in boxes.items():  # from here on they go with the masks
            views[name] = _padded_box(shown_box(box_of(edges, size), source, inner), inner, self.size)

        for flipped, axis, flip in (
            (self.augment.flip, -1, vision.functional.horizontal_flip),
            (self.augment.flip_vertical, -2, vision.functional.vertical_flip),
        ):
            if flipped and draws.uniform() < 0.5:
                image_CHW = image_CHW.flip(axis)
                views = {name: flip(mask) for name, mask in views.items()}
                path, mirrored = path.flipped(axis, self.size), mirrored or axis == -1
        moving = Moving(image_CHW, views, self.fills, path)
        self._turn(moving, draws)
        moving.image_CHW = self._recoloured(moving.image_CHW, draws)
        if self.augment.rand_augment is not None:
            rand_augment(moving, self.augment.rand_augment, draws)
        image_CHW, views = self._erased(moving.image_CHW, draws), moving.maps
        seen = {name: edges_in(views.pop(name), self.size) for name in boxes}
        views = {name: mask[0] if name in flat else mask for name, mask in views.items()}
        image_CHW, views = self._own_steps(image_CHW, views, draws)
        left = {name: edges for name, edges in seen.items() if edges is not None}
        return image_CHW, views, left, partial(self._view, moving.path, size, mirrored)

    def restored(self, maps_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps of an image that was not augmented, back at the image's own `size` (height, width).

        Padding is cut off again; where the image was cropped, the border's values go on to its edge.
        """
        source = self.source(size, Draws(0))
        inner = self.inner_size(source)
        scale_y, scale_x = maps_BCHW.shape[-2] / self.size[0], maps_BCHW.shape[-1] / self.size[1]
        top, left = _margins(inner, self.size)
        bottom, right = self.size[0] - top - inner[0], self.size[1] - left - inner[1]
        # What is negative was cut off of the resized image.
        sides = zip((left, right, top, bottom), (scale_x, scale_x, scale_y, scale_y), strict=True)
        cut = [round(max(0, -margin) * scale) for margin, scale in sides]
        maps_BCHW = F.pad(maps_BCHW, cut, mode="replicate") if any(cut) else maps_BCHW
        shown = Box(
            round(max(0, top) * scale_y),
            round(max(0, left) * scale_x),
            max(1, round(inner[0] * scale_y)),
            max(1, round(inner[1] * scale_x)),
        )
        maps_BCHW = F.interpolate(shown.of(maps_BCHW), (source.height, source.width), mode="bilinear")
        height, width = size
        rest = (
            source.left,
            width - source.left - source.width,
            source.top,
            height - source.top - source.height,
        )
        return F.pad(maps_BCHW, rest, mode="replicate") if any(rest) else maps_BCHW

    def restored_box(self, edges: Sequence[float], size: tuple[int, int]) -> list[float]:
        """A box in the view of an image that was not augmented, in pixels of the image of `size`."""
        source = self.source(size, Draws(0))
        inner = self.inner_size(source)
        (top, left), (height, width) = _margins(inner, self.size), inner
        scales = (source.width / width, source.height / height) * 2
        moves = ((left, source.left), (top, source.top)) * 2
        return [(edge - at) * scale + to for edge, scale, (at, to) in zip(edges, scales, moves, strict=True)]

    def _own_steps(
        self, image_CHW: Tensor, masks: dict[str, Tensor], draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        for step in self.own:
            size, dtype = (image_CHW.shape[-2], image_CHW.shape[-1]), image_CHW.dtype
            shape = (len(image_CHW), *step.size_after(size))
            image_CHW, masks = step(image_CHW, masks, draws)
            if tuple(image_CHW.shape) != shape or image_CHW.dtype != dtype:
                keeps = "keep" if shape[1:] == size else "return"
                advice = "" if len(image_CHW) != shape[0] else " Say what size it makes in size_after."
                raise UserError(
                    f"data.transforms: expected {type(step).__name__} to {keeps} the image {shape} of "
                    f"{dtype}, found {tuple(image_CHW.shape)} of {image_CHW.dtype}.{advice}"
                )
            for name, mask in masks.items():
                if mask.shape[-2:] != image_CHW.shape[-2:]:
                    raise UserError(
                        f"data.transforms: expected {type(step).__name__} to return {name} in the image's "
                        f"size, {shape[1]} x {shape[2]}, found {mask.shape[-2]} x {mask.shape[-1]}."
                    )
        return image_CHW, masks

    def inner_size(self, source: Box) -> tuple[int, int]:
        """The size of the shown part; smaller than `size` where it is to be padded, larger where cut."""
        if self.augment.crop_scale != (1.0, 1.0):
            return self.size
        if isinstance(self.resize, CentreCrop):
            return self.resize.resized(source.height, source.width, self.size)
        if self.resize != "pad":
            return self.size
        scale = min(self.size[0] / source.height, self.size[1] / source.width)
        return max(1, round(source.height * scale)), max(1, round(source.width * scale))

    def _fill(self, task: str) -> float:
        return self.fills.get(task, IGNORE)

    def _shown(self, source: Box) -> Affine:
        """The way of a pixel of the image into the resized and padded `source`."""
        inner = self.inner_size(source)
        top, left = _margins(inner, self.size)
        scale_x, scale_y = inner[1] / source.width, inner[0] / source.height
        return Affine(scale_x, 0.0, left - source.left * scale_x, 0.0, scale_y, top - source.top * scale_y)

    def plain_view(self, size: tuple[int, int]) -> View:
        """The view of an image of `size` that is not augmented."""
        return self._view(self._shown(self.source(size, Draws(0))), size, False)

    def _view(self, path: Affine, size: tuple[int, int], flipped: bool) -> View:
        plain = replace(self, augment=PRESETS["none"]) if self.augment != PRESETS["none"] else self
        unvaried = plain._shown(plain.source(size, Draws(0)))
        zoom = math.sqrt(path.enlargement / unvaried.enlargement)
        return View(path.matrix, self.size, zoom, size, flipped)

    def _turn(self, moving: Moving, draws: Draws) -> None:
        augment = self.augment
        if not augment.rotate and not augment.translate and augment.zoom == (1.0, 1.0):
            return
        angle = draws.uniform(-augment.rotate, augment.rotate)
        shift = [round(draws.uniform(-augment.translate, augment.translate) * side) for side in self.size]
        moving.move(angle, shift[::-1], draws.uniform(*augment.zoom), [0.0, 0.0])

    def _recoloured(self, image_CHW: Tensor, draws: Draws) -> Tensor:
        strengths = (self.augment.brightness, self.augment.contrast, self.augment.saturation)
        if not any(strengths):
            return image_CHW
        brightness, contrast, saturation = (draws.uniform(1 - s, 1 + s) for s in strengths)
        pixels = image_CHW.float()
        if len(pixels) == 3:
            grey = torch.tensordot(torch.tensor(_GREY), pixels, dims=1)
            pixels = torch.lerp(grey, pixels, saturation)
        pixels = torch.lerp(pixels.mean(), pixels, contrast) * brightness
        return pixels.round_().clamp_(0, 255).to(torch.uint8) if image_CHW.dtype == torch.uint8 else pixels

    def _erased(self, image_CHW: Tensor, draws: Draws) -> Tensor:
        if not self.augment.erase or draws.uniform() >= self.augment.erase:
            return image_CHW
        box = _random_box(*self.size, _ERASED_AREA, _ERASED_RATIO, draws)
        colour = image_CHW.mean((-2, -1), dtype=torch.float32).to(image_CHW.dtype)
        image_CHW = image_CHW.clone()
        box.of(image_CHW)[:] = colour[:, None, None]
        return image_CHW


def _random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> Box:
    """A box of random area and shape inside an image; the largest central one if ten tries don't fit."""
    for _ in range(_CROP_TRIES):
        area = height * width * draws.uniform(*scale)
        shape = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(draws.uniform(0, height - box_height + 1))
            left = int(draws.uniform(0, width - box_width + 1))
            return Box(top, left, box_height, box_width)
    shape = min(max(width / height, ratio[0]), ratio[1])
    box_height, box_width = min(height, round(width / shape)), min(width, round(height * shape))
    return Box((height - box_height) // 2, (width - box_width) // 2, max(1, box_height), max(1, box_width))


def _padded(image: Tensor, size: tuple[int, int], value: float) -> Tensor:
    height, width = image.shape[-2:]
    top, left = _margins((height, width), size)
    return F.pad(image, (left, size[1] - width - left, top, size[0] - height - top), value=value)


def _padded_box(box: Tensor, inner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    top, left = _margins(inner, size)
    edges = box.as_subclass(torch.Tensor) + torch.tensor([left, top]).repeat(2)
    return box_of(edges[0].tolist(), size)


def _margins(inner: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Above and left of a picture in the middle of a larger one; negative where it is the larger one, and
    then rounded as torchvision's CenterCrop does."""
    top, left = (
        (whole - side) // 2 if whole >= side else -round((side - whole) / 2)
        for whole, side in zip(size, inner, strict=True)
    )
    return top, left


def size_after(steps: Sequence[ImageTransform], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of `size` after all of the steps."""
    for step in steps:
        size = step.size_after(size)
    return size
