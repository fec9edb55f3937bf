"""The U-Net decoder: from a backbone's deepest map up to the image's resolution.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.errors import UserError
from mtl_dist.models.features import map_key
from mtl_dist.models.norms import make_norm
from mtl_dist.models.settings import DecoderNorm, DecoderSettings

_MOST_CHANNELS = 512
_LEAST_CHANNELS = 16


@dataclass(frozen=True)
class Level:
    """One level: the stride it ends at, its channels, and those of the backbone's map joined (0: none)."""

    stride: int
    channels: int
    skip_channels: int


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder's levels, from the deepest map (its stride and channels) upwards."""

    stride: int
    channels: int
    levels: tuple[Level, ...]

    @property
    def strides(self) -> set[int]:
        """The strides of the maps that the decoder reads."""
        return {self.stride} | {level.stride for level in self.levels if level.skip_channels}


def plan_decoder(settings: DecoderSettings, channels: Mapping[int, int], task: str) -> DecoderPlan:
    """The levels over a backbone whose maps have `channels` by stride.

    Raises:
        UserError: more levels than lead from the deepest map to the output's stride.
    """
    deepest = max(channels)
    most = (deepest // settings.output_stride).bit_length() - 1
    widths = settings.channels or _default_channels(settings, channels)
    if len(widths) > most:
        raise UserError(
            f"model.decoder.channels (task {task}): expected at most {most} levels, from stride {deepest} "
            f"to stride {settings.output_stride}, found {len(widths)}. Give fewer numbers."
        )
    levels = []
    for index, width in enumerate(widths, start=1):
        stride = deepest >> index
        levels.append(Level(stride, width, channels.get(stride, 0) if settings.skips else 0))
    return DecoderPlan(deepest, channels[deepest], tuple(levels))


class UNetDecoder(nn.Module):
    """Levels of doubling resolution, each joined by the backbone's map there, then a 1x1 convolution.

    What the levels leave to the output's resolution is done by bilinear interpolation.
    """

    def __init__(self, plan: DecoderPlan, output_stride: int, norm: DecoderNorm, num_outputs: int) -> None:
        super().__init__()
        self.plan = plan
        self.reads = tuple(map_key(stride) for stride in sorted(plan.strides))
        self.output_stride = output_stride
        widths = [plan.channels, *(level.channels for level in plan.levels)]
        self.levels = nn.ModuleList(
            _double_convolution(width + level.skip_channels, level.channels, norm)
            for width, level in zip(widths, plan.levels, strict=False)
        )
        self.output = nn.Conv2d(widths[-1], num_outputs, 1)

    def forward(self, features: Mapping[str, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W), of the image's size over the output stride, rounded up."""
        x_BDHW = features[map_key(self.plan.stride)]
        for level, convolve in zip(self.plan.levels, self.levels, strict=True):
            if level.skip_channels:
                skip_BDHW = features[map_key(level.stride)]
                x_BDHW = F.interpolate(x_BDHW, size=skip_BDHW.shape[2:], mode="nearest")
                x_BDHW = torch.cat((x_BDHW, skip_BDHW), dim=1)
            else:
                x_BDHW = F.interpolate(x_BDHW, size=_scaled(image_size, level.stride), mode="nearest")
            x_BDHW = convolve(x_BDHW)
        output_BCHW = self.output(x_BDHW)
        size = _scaled(image_size, self.output_stride)
        if tuple(output_BCHW.shape[2:]) == size:
            return output_BCHW
        return F.interpolate(output_BCHW, size=size, mode="bilinear", align_corners=False)


def _double_convolution(in_channels: int, channels: int, norm: DecoderNorm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        make_norm(norm, channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        make_norm(norm, channels),
        nn.ReLU(inplace=True),
    )


def _default_channels(settings: DecoderSettings, channels: Mapping[int, int]) -> tuple[int, ...]:
    """Half the deepest map's channels as a power of two, at most 512, halved per level, at least 16."""
    deepest = max(channels)
    last = 1 if settings.output_stride == 1 and 1 in channels else 2
    first = min(_MOST_CHANNELS, 1 << (channels[deepest] // 2).bit_length() - 1)
    num_levels = (deepest // last).bit_length() - 1
    return tuple(max(first >> index, _LEAST_CHANNELS) for index in range(num_levels))


def _scaled(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-image_size[0] // stride), -(-image_size[1] // stride)
