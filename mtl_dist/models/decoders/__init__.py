"""Decoders: from a backbone's maps to a map of outputs. One file each, and one line here.

A decoder is a module whose constructor names what it needs of `num_outputs`, `channels` (by stride),
`blocks` (what a plain ViT gives of its blocks) and `head_norm` among its settings, and which is called with
the maps by stride and the image's size (H, W). `used_strides(channels)` says which maps it reads; one that
reads maps of blocks says `used_blocks(blocks, ...)` instead, and is called with pairs of a map and the tokens
before it. A user-defined one is named by its import path; those below by a short name. The U-Net decoder is
the default (`unet.py`); `smp_library.py` has what those of segmentation-models-pytorch have in common.
"""

DECODERS = {
    "fpn": "mtl_dist.models.decoders.fpn.FPNDecoder",
    "linear": "mtl_dist.models.decoders.linear.LinearDecoder",
    "upernet": "mtl_dist.models.decoders.upernet.UPerNetDecoder",
    "deeplabv3plus": "mtl_dist.models.decoders.deeplabv3plus.DeepLabV3PlusDecoder",
    "segformer": "mtl_dist.models.decoders.segformer.SegFormerDecoder",
    "dpt": "mtl_dist.models.decoders.dpt.DPTDecoder",
}
"""The class of each decoder beside the U-Net."""
