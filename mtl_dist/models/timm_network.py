"""A whole network of timm: its maps by stride, and what a plain ViT lacks of them.

A network with maps at several strides (a CNN, a pyramid of transformers) gives them as they are. A plain
ViT, which has one stride, gives its own map and above it a simple pyramid, as ViTDet does
(https://arxiv.org/abs/2203.16527): transposed convolutions to the strides 4 and 8, all from the last block or
from the blocks that `model.timm.blocks` names.

Shape legend: batch.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.errors import UserError
from mtl_dist.models.features import VECTOR, Blocks, map_key
from mtl_dist.models.norms import convert_norms, group_norm
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.timm_library import configuration, converter, create, published_weights
from mtl_dist.models.tracing import MAX_STRIDE
from mtl_dist.models.weights import load_timm_weights

Size: TypeAlias = tuple[int, int]

FINE_STRIDES = (4, 8)
"""What a plain ViT's pyramid adds to its own stride."""

_WITH_PREFIX = "return_prefix_tokens"
"""timm's word for the tokens before those of the patches: of the class, registers."""

NUM_IMAGES = 2
"""Of a probe on the meta device: layers that take statistics want more than one."""


@dataclass(frozen=True)
class Sizes:
    """Which images a network takes: only those of `fixed` (H, W), or any; sides come in multiples of
    `multiple`, to which others are enlarged."""

    fixed: Size | None
    multiple: Size

    def fitted(self, size: Size) -> Size:
        """`size`, enlarged to multiples."""
        return tuple(-(-side // of) * of for side, of in zip(size, self.multiple, strict=True))  # type: ignore[return-value]

    def fit(self, images_BCHW: Tensor) -> Tensor:
        """Images as the network takes them.

        Raises:
            UserError: they have another size than the one it was built for.
        """
        found = (images_BCHW.shape[2], images_BCHW.shape[3])
        size = self.fitted(found)
        if self.fixed is not None and size != self.fixed:
            raise UserError(
                f"images: expected {self.fixed[0]} x {self.fixed[1]}, the size that this backbone was built "
                f"for, found {found[0]} x {found[1]}. Resize them."
            )
        if size == found:
            return images_BCHW
        return F.interpolate(images_BCHW, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class TimmNetwork:
    """A network of timm with its weights: what heads are planned on and a backbone is cut from.

    Args:
        module: timm's, without classifier
        pyramid: by stride, what makes its map of one of the module's
        channels: of the map at each stride
        sources: for each stride, which of the module's intermediate maps it is, or is made of
        vector_stride: of the map whose mean is the vector, the deepest of the module's own
        is_plain: a plain ViT, whose maps are normalised as its last one
        num_blocks: how many intermediate maps it has
    """

    module: nn.Module
    pyramid: nn.ModuleDict
    channels: Mapping[int, int]
    sources: Mapping[int, int]
    vector_stride: int
    in_channels: int
    sizes: Sizes
    is_plain: bool
    num_blocks: int

    @property
    def vector_size(self) -> int:
        """The channels of the vector."""
        return self.channels[self.vector_stride]

    def vector_name(self, with_maps: bool) -> str:
        """The feature that the vector comes from: the deepest map where maps are wanted too."""
        return map_key(self.vector_stride) if with_maps else VECTOR

    @property
    def blocks(self) -> Blocks | None:
        """What it can give of each of its blocks; None where it is no plain ViT."""
        if not self.is_plain:
            return None
        return Blocks(
            self.num_blocks,
            self.vector_stride,
            self.vector_size,
            _num_prefix(self.module),
            self.sources[self.vector_stride] + 1,
        )


def build_timm_network(settings: ModelSettings, in_channels: int, image_size: Size) -> TimmNetwork:
    """The network that `settings.backbone` names, with its weights loaded and its norms converted.

    Raises:
        UserError: no such network, weights or blocks that don't fit it, images of a size it doesn't take.
    """
    name = settings.backbone_name
    config = configuration(name)
    arguments = {**settings.timm.arguments, "in_chans": in_channels, "num_classes": 0}
    is_fixed = bool(config.get("fixed_input_size"))
    if settings.output_stride is not None:
        arguments["output_stride"] = settings.output_stride
    try:
        module, sizes = _of_size(name, arguments, image_size, is_fixed)
    except UserError:
        if settings.output_stride is not None:
            raise UserError(not_dilated(name, settings.output_stride)) from None
        raise
    strides = _strides(module)
    is_plain = len(strides) > 1 and len(set(strides.values())) == 1
    sources = _sources(strides, settings.timm.blocks, name, is_plain)
    maps = _probe(module, sources, in_channels, sizes.fitted(image_size), is_plain, name)
    own_stride = max(strides.values())
    pyramid = nn.ModuleDict(
        {
            str(stride): _finer(maps[source], own_stride // stride)
            for stride, source in sources.items()
            if stride < own_stride
        }
        if is_plain
        else {}
    )
    channels = {
        stride: _width(pyramid[str(stride)]) if str(stride) in pyramid else maps[source]
        for stride, source in sources.items()
    }
    if settings.weights is not None:
        state = published_weights(name) if settings.weights == "timm" else settings.weights
        load_timm_weights(module, pyramid, config.get("classifier") or (), name, state, converter(name))
    convert_norms(module, settings.norm)
    return TimmNetwork(
        module, pyramid, channels, sources, own_stride, in_channels, sizes, is_plain, len(strides)
    )


def not_dilated(name: str, output_stride: int | None) -> str:
    """The line about a network that cannot be dilated to this stride."""
    return (
        f"model.output_stride: expected none with {name}, which can't be dilated to {output_stride}, found "
        "one. Remove it, or take torchvision's resnet50, mobilenet_v3_large (16 alone) or a ResNet of timm."
    )


def _of_size(
    name: str, arguments: Mapping[str, Any], image_size: Size, is_fixed: bool
) -> tuple[nn.Module, Sizes]:
    """The network for images of this size, and which others it then takes."""
    module, takes_any = _created(name, arguments, image_size, is_fixed)
    feat_ratio = getattr(getattr(module, "patch_embed", None), "feat_ratio", None)
    if feat_ratio is None:
        return module, Sizes(None if takes_any else image_size, (1, 1))
    ratio = feat_ratio()
    multiple = (ratio, ratio) if isinstance(ratio, int) else tuple(ratio)
    size = Sizes(None, multiple).fitted(image_size)
    if size != image_size:
        module, takes_any = _created(name, arguments, size, is_fixed)
    return module, Sizes(None if takes_any else size, multiple)


def _created(name: str, arguments: Mapping[str, Any], size: Size, is_fixed: bool) -> tuple[nn.Module, bool]:
    """The network, and whether it takes images of other sizes than this one too.

    A constructor that does not know an option says so before it draws any weight.
    """
    ways: list[tuple[dict[str, Any], bool]] = [({"img_size": size, "dynamic_img_size": True}, True)]
    ways += [({"img_size": size}, False)] if is_fixed else []
    for own, takes_any in ways:
        module = create(name, {**own, **arguments}, optional=own)
        if module is not None:
            return module, takes_any
    module = create(name, arguments)
    assert module is not None
    return module, True


def _strides(module: nn.Module) -> dict[int, int]:
    """The stride of each of the network's intermediate maps, as far as it is one of ours."""
    info = module.feature_info
    entries = info if isinstance(info, list) else info.info  # type: ignore[union-attr]
    strides = {
        number: 2 ** round(math.log2(entry["reduction"]))
        for number, entry in enumerate(entries)  # type: ignore[arg-type]
    }
    return {number: stride for number, stride in strides.items() if stride <= MAX_STRIDE}


def _sources(
    strides: Mapping[int, int], blocks: tuple[int, ...] | None, name: str, is_plain: bool
) -> dict[int, int]:
    """For each stride the number of the intermediate map that it comes from."""
    if not is_plain:
        if blocks is not None:
            raise UserError(
                f"model.timm.blocks: expected none with {name}, which has maps at the strides "
                f"{', '.join(map(str, sorted(set(strides.values()))))}, found some. Remove them: they are of "
                "a plain ViT."
            )
        return dict(sorted({stride: number for number, stride in strides.items()}.items()))
    own = next(iter(strides.values()))
    wanted = [stride for stride in FINE_STRIDES if stride < own] + [own]
    chosen = blocks or (len(strides),)
    if (
        len(chosen) not in (1, len(wanted))
        or sorted(set(chosen)) != list(chosen)
        or chosen[-1] > len(strides)
    ):
        raise UserError(
            f"model.timm.blocks: expected 1 number or {len(wanted)} rising ones up to {len(strides)}, the "
            f"blocks of {name} that the maps at the strides {', '.join(map(str, wanted))} come from, found "
            f"{', '.join(map(str, chosen))}. Correct them."
        )
    numbers = chosen * len(wanted) if len(chosen) == 1 else chosen
    return {stride: number - 1 for stride, number in zip(wanted, numbers, strict=True)}


def _probe(
    module: nn.Module, sources: Mapping[int, int], in_channels: int, size: Size, is_plain: bool, name: str
) -> dict[int, int]:
    """The channels of the intermediate maps that are wanted, by number, computed on the meta device."""
    indices = sorted(set(sources.values()))
    image = torch.empty(NUM_IMAGES, in_channels, *size, device="meta")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    meta = {f"module.{key}": torch.empty_like(tensor, device="meta") for key, tensor in tensors}
    try:
        with torch.no_grad():
            maps = torch.func.functional_call(_Probe(module, indices, is_plain), meta, (image,))
    except (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.backbone: {name} doesn't give maps of images of {size[0]} x {size[1]} ({reason}). "
            "Choose another data.image_size or another backbone."
        ) from None
    return {number: map_BDHW.shape[1] for number, map_BDHW in zip(indices, maps, strict=True)}


def intermediates(
    module: nn.Module, images_BCHW: Tensor, indices: list[int], normalised: bool, with_prefix: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The maps (B, D, H, W) of these numbers that a network of timm has between its layers, and the tokens
    (B, P, D) before each; without `with_prefix` none of these."""
    found: list[Any] = module.forward_intermediates(  # type: ignore[operator]
        images_BCHW,
        indices=indices,
        norm=normalised,
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
        **({_WITH_PREFIX: True} if with_prefix else {}),
    )
    if not with_prefix:
        return found, []
    return [map_BDHW for map_BDHW, _ in found], [prefix_BPD for _, prefix_BPD in found]


def _num_prefix(module: nn.Module) -> int:
    """The tokens before those of the patches, as far as the network gives them."""
    gives = _WITH_PREFIX in inspect.signature(module.forward_intermediates).parameters  # type: ignore[arg-type]
    return int(getattr(module, "num_prefix_tokens", 0)) if gives else 0


class _Probe(nn.Module):
    """A module, so that its weights can be swapped."""

    def __init__(self, module: nn.Module, indices: list[int], normalised: bool) -> None:
        super().__init__()
        self.module, self.indices, self.normalised = module, indices, normalised

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        return intermediates(self.module, images_BCHW, self.indices, self.normalised)[0]


def _finer(channels: int, factor: int) -> nn.Sequential:
    """From a ViT's map to one of `factor` (2, 4, 8) times its size, the channels halved each time."""
    layers: list[nn.Module] = []
    while factor > 1:
        width = max(channels // 2, 1)
        layers += [group_norm(channels), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(channels, width, 2, stride=2))
        channels, factor = width, factor // 2
    return nn.Sequential(*layers)


def _width(level: nn.Module) -> int:
    *_, last = level.children()
    assert isinstance(last, nn.ConvTranspose2d)
    return last.out_channels
