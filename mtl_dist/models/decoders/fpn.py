"""The feature pyramid decoder of Panoptic FPN (https://arxiv.org/abs/1901.02446).

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from mtl_dist.models.norms import make_norm

_LEAST_STRIDE = 4
"""The paper's pyramid ends here; a backbone whose maps are all deeper ends at its own finest map."""

Width = Annotated[int, Field(ge=1)]


class FPNDecoder(nn.Module):
    """Every map of stride 4 and above, joined from the deepest one down, brought to one size and added up.

    A level of the pyramid is brought to the finest one's size by a convolution, GroupNorm, ReLU and a
    doubling for each step between them, as in the paper; the output is enlarged to the image's size.

    Args:
        num_outputs: the channels of the output
        channels: the channels of the backbone's map at each stride
        pyramid_channels: of each level of the pyramid
        width: of the maps that are added up
        dropout: of whole channels before the output layer, in training
    """

    def __init__(
        self,
        num_outputs: int,
        channels: Mapping[int, int],
        pyramid_channels: Width = 256,
        width: Width = 128,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        self.strides = self.used_strides(channels)
        self.pyramid = FeaturePyramidNetwork([channels[stride] for stride in self.strides], pyramid_channels)
        finest = self.strides[0]
        self.levels = nn.ModuleList(
            _level(pyramid_channels, width, num_doublings=(stride // finest).bit_length() - 1)
            for stride in self.strides
        )
        self.dropout = nn.Dropout2d(dropout)
        self.output = nn.Conv2d(width, num_outputs, 1)

    @staticmethod
    def used_strides(channels: Mapping[int, int]) -> list[int]:
        """The strides of the maps that it reads, of those that there are."""
        return sorted(stride for stride in channels if stride >= _LEAST_STRIDE) or sorted(channels)

    def forward(self, maps: Mapping[int, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W), of the image's size."""
        pyramid = self.pyramid({str(stride): maps[stride] for stride in self.strides})
        size = maps[self.strides[0]].shape[2:]
        x_BDhw = sum(
            # Sizes that are not multiples of the stride leave a doubled map a row or a column too large.
            F.interpolate(level(pyramid[str(stride)]), size=size, mode="bilinear", align_corners=False)
            for stride, level in zip(self.strides, self.levels, strict=True)
        )
        output_BChw = self.output(self.dropout(x_BDhw))
        return F.interpolate(output_BChw, size=image_size, mode="bilinear", align_corners=False)


def _level(in_channels: int, width: int, num_doublings: int) -> nn.Sequential:
    """Convolutions from a level of the pyramid to the finest one's size: one per doubling, at least one."""
    layers: list[nn.Module] = []
    for number in range(max(1, num_doublings)):
        layers += [
            nn.Conv2d(in_channels if number == 0 else width, width, 3, padding=1, bias=False),
            make_norm("group", width),
            nn.ReLU(inplace=True),
        ]
        if num_doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
