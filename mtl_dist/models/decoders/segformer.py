"""The decoder of SegFormer (https://arxiv.org/abs/2105.15203), from segmentation-models-pytorch.

Shape legend: batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.models.checkpointing import inner_blocks
from mtl_dist.models.decoders import smp_library
from mtl_dist.models.decoders.smp_library import Dropout, Width
from mtl_dist.models.settings import DecoderNorm


class SegFormerDecoder(nn.Module):
    """Every map from stride 4 on through a linear layer of its own, enlarged to the finest one, and joined.

    The output is enlarged to the image's size.

    Args:
        num_outputs: the channels of the output
        channels: the channels of the backbone's map at each stride
        head_norm: batch or group, as `model.norm` says
        width: of each map after its linear layer
        dropout: of whole channels before the output layer, in training
        norm: None: as `model.norm` says, and GroupNorm where that is frozen

    Raises:
        UserError: segmentation-models-pytorch is not installed.
    """

    def __init__(
        self,
        num_outputs: int,
        channels: Mapping[int, int],
        head_norm: DecoderNorm,
        width: Width = 256,
        dropout: Dropout = 0.1,
        norm: DecoderNorm | None = None,
    ) -> None:
        super().__init__()
        self.strides = self.used_strides(channels)
        make = smp_library.library_class("segformer", "segformer", "SegformerDecoder")
        # The image's own channels and a stride without map, which it leaves out, come first.
        widths = [0, 0, *(channels[stride] for stride in self.strides)]
        decoder = make(
            encoder_channels=widths, encoder_depth=max(3, len(widths) - 1), segmentation_channels=width
        )
        self.decoder = smp_library.made_ready(decoder, norm or head_norm)
        self.output = smp_library.output_layer(width, num_outputs, dropout)

    @staticmethod
    def used_strides(channels: Mapping[int, int]) -> list[int]:
        """The strides of the maps that it reads, of those that there are."""
        return smp_library.used_strides(channels)

    def blocks(self) -> Iterable[nn.Module]:
        """What gradient checkpointing by block computes again, one at a time."""
        return inner_blocks(self.decoder)

    def forward(self, maps: Mapping[int, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W), of the image's size."""
        own = [maps[stride] for stride in self.strides]
        # It asks the first of its maps for a size alone: four times that at which it joins the others.
        height, width = own[0].shape[2:]
        empty = own[0].new_empty(1, 0, 4 * height, 4 * width)
        output_BChw = self.output(self.decoder([empty, empty, *own]))
        return F.interpolate(output_BChw, size=image_size, mode="bilinear", align_corners=False)
