"""The linear decoder: one output layer on a single map, for probing what a backbone already knows.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


class LinearDecoder(nn.Module):
    """A 1x1 convolution of the deepest map, enlarged to the image's size by bilinear interpolation.

    Args:
        num_outputs: the channels of the output
        channels: the channels of the backbone's map at each stride
        dropout: of whole channels of the map, in training
    """

    def __init__(self, num_outputs: int, channels: Mapping[int, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.stride = self.used_strides(channels)[0]
        self.dropout = nn.Dropout2d(dropout)
        self.output = nn.Conv2d(channels[self.stride], num_outputs, 1)

    @staticmethod
    def used_strides(channels: Mapping[int, int]) -> list[int]:
        """The strides of the maps that it reads, of those that there are."""
        return [max(channels)]

    def forward(self, maps: Mapping[int, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W), of the image's size."""
        output_BChw = self.output(self.dropout(maps[self.stride]))
        return F.interpolate(output_BChw, size=image_size, mode="bilinear", align_corners=False)
