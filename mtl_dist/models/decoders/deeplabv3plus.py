"""The decoder of DeepLabv3+ (https://arxiv.org/abs/1802.02611), from segmentation-models-pytorch.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.errors import UserError
from mtl_dist.models.checkpointing import inner_blocks
from mtl_dist.models.decoders import smp_library
from mtl_dist.models.decoders.smp_library import Dropout, Width
from mtl_dist.models.settings import DecoderNorm

_PAPERS_STRIDE = 16


class DeepLabV3PlusDecoder(nn.Module):
    """Atrous spatial pyramid pooling of the deepest map, joined by the one at stride 4.

    The paper's deepest map is at stride 16 or 8: `model.output_stride` dilates a backbone to that. The
    output is enlarged to the image's size.

    Args:
        num_outputs: the channels of the output
        channels: the channels of the backbone's map at each stride
        head_norm: batch or group, as `model.norm` says
        width: of the pooled maps and what they are joined to
        atrous_rates: of the three dilated convolutions; at stride 8 the paper doubles them
        separable: whether those are depthwise and pointwise ones
        aspp_dropout: of single values after the pooling, in training
        dropout: of whole channels before the output layer, in training
        norm: None: as `model.norm` says, and GroupNorm where that is frozen

    Raises:
        UserError: segmentation-models-pytorch is not installed, or the backbone has maps at one stride alone.
    """

    def __init__(
        self,
        num_outputs: int,
        channels: Mapping[int, int],
        head_norm: DecoderNorm,
        width: Width = 256,
        atrous_rates: tuple[Width, Width, Width] = (12, 24, 36),
        separable: bool = True,
        aspp_dropout: Dropout = 0.5,
        dropout: Dropout = 0.0,
        norm: DecoderNorm | None = None,
    ) -> None:
        super().__init__()
        self.fine, self.deep = self.used_strides(channels)
        make = smp_library.library_class("deeplabv3plus", "deeplabv3", "DeepLabV3PlusDecoder")
        decoder = make(
            encoder_channels=[0, 0, channels[self.fine], channels[self.deep]],
            encoder_depth=4,
            out_channels=width,
            atrous_rates=atrous_rates,
            output_stride=_PAPERS_STRIDE,
            aspp_separable=separable,
            aspp_dropout=aspp_dropout,
        )
        self.decoder = smp_library.made_ready(decoder, norm or head_norm)
        self.output = smp_library.output_layer(width, num_outputs, dropout)

    @staticmethod
    def used_strides(channels: Mapping[int, int]) -> list[int]:
        """The strides of the maps that it reads, of those that there are: a fine one and the deepest.

        Raises:
            UserError: there is one alone.
        """
        strides = smp_library.used_strides(channels)
        strides = strides if len(strides) > 1 else sorted(channels)
        if len(strides) < 2:
            raise UserError(
                "model.decoder: expected a backbone with maps at two strides or more for deeplabv3plus, "
                f"found one with stride {strides[0]} alone. Use unet, fpn, upernet, segformer or linear, or "
                "another backbone."
            )
        return [strides[0], strides[-1]]

    @property
    def remark(self) -> str:
        """What is odd about the maps that it reads; nothing where they are as in the paper."""
        if self.deep <= _PAPERS_STRIDE:
            return ""
        return (
            f"deeplabv3plus reads the backbone at stride {self.deep}, where the paper has 16 or 8. "
            "model.output_stride=16 dilates a backbone that can be dilated."
        )

    def blocks(self) -> Iterable[nn.Module]:
        """What gradient checkpointing by block computes again, one at a time."""
        return inner_blocks(self.decoder)

    def forward(self, maps: Mapping[int, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W), of the image's size."""
        # The library's own forward enlarges by a fixed factor, which fits images of multiples of 16 alone.
        pooled_BDhw, fine_BDhw = self.decoder.aspp(maps[self.deep]), self.decoder.block1(maps[self.fine])
        pooled_BDhw = F.interpolate(
            pooled_BDhw, size=fine_BDhw.shape[2:], mode="bilinear", align_corners=True
        )
        output_BChw = self.output(self.decoder.block2(torch.cat((pooled_BDhw, fine_BDhw), dim=1)))
        return F.interpolate(output_BChw, size=image_size, mode="bilinear", align_corners=False)
