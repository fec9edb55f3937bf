"""The decoder of DPT, the dense prediction transformer (https://arxiv.org/abs/2103.13413), from
segmentation-models-pytorch.

Shape legend: batch.py; P tokens before those of the patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_dist.errors import UserError
from mtl_dist.models.checkpointing import inner_blocks
from mtl_dist.models.decoders import smp_library
from mtl_dist.models.decoders.smp_library import Dropout, Width
from mtl_dist.models.features import Blocks
from mtl_dist.models.norms import make_norm
from mtl_dist.models.settings import DecoderNorm

_MOST = 4
"""Maps, at the strides 4, 8, 16 and 32."""


class DPTDecoder(nn.Module):
    """Maps of up to four blocks of a plain ViT, brought to the strides 4, 8, 16 and 32 and fused from the
    deepest one up.

    The output is enlarged to the image's size. All maps pass the network's last normalisation.

    Args:
        num_outputs: the channels of the output
        blocks: what the ViT gives of each of its blocks
        head_norm: batch or group, as `model.norm` says
        from_blocks: the blocks, counted from 1, that the maps come from; None: four at equal distances, the
            last one of them the network's last
        readout: what becomes of the class token: `cat` beside each patch through a linear layer, `add` the
            mean of the tokens before the patches, `ignore`; None: `cat` where there is one
        widths: of the map of each of these blocks
        width: of the fused maps
        dropout: of whole channels before the output layer, in training
        norm: None: as `model.norm` says, and GroupNorm where that is frozen

    Raises:
        UserError: segmentation-models-pytorch is not installed, or the settings do not fit the network.
    """

    def __init__(
        self,
        num_outputs: int,
        blocks: Blocks,
        head_norm: DecoderNorm,
        from_blocks: Annotated[tuple[Width, ...], Field(min_length=1, max_length=_MOST)] | None = None,
        readout: Literal["cat", "add", "ignore"] | None = None,
        widths: tuple[Width, Width, Width, Width] = (256, 512, 1024, 1024),
        width: Width = 256,
        dropout: Dropout = 0.1,
        norm: DecoderNorm | None = None,
    ) -> None:
        super().__init__()
        numbers, with_prefix = self.used_blocks(blocks, from_blocks, readout)
        make = smp_library.library_class("dpt", "dpt", "DPTDecoder")
        decoder = make(
            encoder_out_channels=[blocks.channels] * len(numbers),
            encoder_output_strides=[blocks.stride] * len(numbers),
            encoder_has_prefix_tokens=with_prefix,
            readout=(readout or "cat") if with_prefix else "ignore",
            intermediate_channels=widths[: len(numbers)],
            fusion_channels=width,
        )
        self.decoder = smp_library.made_ready(decoder, norm or head_norm)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), make_norm(norm or head_norm, width), nn.ReLU()
        )
        self.output = smp_library.output_layer(width, num_outputs, dropout)

    @staticmethod
    def used_blocks(
        blocks: Blocks, from_blocks: tuple[int, ...] | None = None, readout: str | None = None
    ) -> tuple[list[int], bool]:
        """The numbers of the blocks whose maps it reads, and whether it reads the tokens before those."""
        count = min(_MOST, blocks.number)
        numbers = from_blocks or tuple(blocks.number * index // count for index in range(1, count + 1))
        if sorted(set(numbers)) != list(numbers) or numbers[-1] > blocks.number:
            raise UserError(
                f"model.decoder.from_blocks: expected rising numbers up to {blocks.number}, the blocks of "
                f"the backbone, found {', '.join(map(str, numbers))}. Correct them."
            )
        if readout in ("cat", "add") and not blocks.num_prefix:
            raise UserError(
                "model.decoder.readout: expected ignore for a backbone without a class token, found "
                f"{readout}. Remove it."
            )
        return list(numbers), bool(blocks.num_prefix) and readout != "ignore"

    def blocks(self) -> Iterable[nn.Module]:
        """What gradient checkpointing by block computes again, one at a time."""
        return [*inner_blocks(self.decoder), self.head]

    def forward(self, maps: Sequence[tuple[Tensor, Tensor | None]], image_size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W), of the image's size, from maps (B, D, h, w) and tokens (B, P, D)."""
        own = self.decoder
        levels = [
            reassemble(project(map_BDhw, prefix_BPD))
            for (map_BDhw, prefix_BPD), project, reassemble in zip(
                maps, own.projection_blocks, own.reassemble_blocks, strict=True
            )
        ]
        fused_BDhw: Tensor | None = None
        for level_BDhw, fuse in zip(reversed(levels), own.fusion_blocks, strict=True):
            # The library's own forward doubles the sizes, which fits images of multiples of 32 alone.
            if fused_BDhw is not None and fused_BDhw.shape[2:] != level_BDhw.shape[2:]:
                fused_BDhw = F.interpolate(
                    fused_BDhw, size=level_BDhw.shape[2:], mode="bilinear", align_corners=True
                )
            fused_BDhw = fuse(level_BDhw, fused_BDhw)
        output_BChw = self.output(self.head(fused_BDhw))
        return F.interpolate(output_BChw, size=image_size, mode="bilinear", align_corners=True)
