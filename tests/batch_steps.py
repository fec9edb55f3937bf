"""Steps on the images of a batch, as people write them."""

from __future__ import annotations

from torch import Tensor

from mtl_dist.data.transforms import BatchTransform
from mtl_dist.randomness import Draws


class Lift(BatchTransform):
    """Adds one number to the images of a batch."""

    def __call__(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        return images_BCHW + int(draws.uniform(1, 100))


class Shrunk(BatchTransform):
    """Returns images of another size."""

    def __call__(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        return images_BCHW[..., :4]


class Failing(BatchTransform):
    """It fails."""

    def __call__(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        raise RuntimeError("no room")
