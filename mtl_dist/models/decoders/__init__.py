"""Decoders: from a backbone's maps to a map of outputs. One file each, and one line here.

A decoder is a module whose constructor names what it needs of `num_outputs` and `channels` (by stride) among
its settings, and which is called with the maps by stride and the image's size (H, W). A user-defined one is
named by its import path; those below by a short name. The U-Net decoder is the default (`unet.py`).
"""

DECODERS = {
    "fpn": "mtl_dist.models.decoders.fpn.FPNDecoder",
    "linear": "mtl_dist.models.decoders.linear.LinearDecoder",
}
"""The class of each decoder beside the U-Net."""
