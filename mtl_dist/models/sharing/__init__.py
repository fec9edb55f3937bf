"""Ways of sharing: what of the model all tasks have in common. One file each, and one line here.

A way of sharing is a model: a class derived from `MultitaskModel` (models/multitask.py), whose constructor
names its settings, and `blueprint` (models/blueprint.py), of which backbones and heads are made. A
user-defined one is named by its import path; those below by a short name. One backbone for all tasks is the
default, `hard` (`hard.py`).
"""

SHARINGS = {
    "cross_stitch": "mtl_dist.models.sharing.cross_stitch.CrossStitch",
    "mmoe": "mtl_dist.models.sharing.mmoe.MMoE",
    "mtan": "mtl_dist.models.sharing.mtan.MTAN",
    "separate": "mtl_dist.models.sharing.separate.Separate",
}
"""The class of each way beside `hard`."""
