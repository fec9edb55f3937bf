"""Whether the images of a run become what a network expects: mean 0 and standard deviation 1, about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.inspect import spread
from mtl_dist.data.loader import Data
from mtl_dist.data.reader import UnreadableSample

_LOOKED_AT = 16
_FAR_MEAN, _FAR_STD = 2.0, 5.0


def odd_normalisation(data: Data, mean: Sequence[float], std: Sequence[float]) -> str:
    """What to say where normalised training images are far from mean 0 and deviation 1; else nothing.

    A few images of each training source are looked at.
    """
    images = []
    for source in data.sources["train"]:
        for row in spread(source.reader.num_samples, _LOOKED_AT):
            try:
                image = decode_image(bytes(source.reader.read(row).image), data.channels, data.image_dtype)
            except (UnreadableSample, UnreadableImage):
                continue  # the loader speaks of it
            images.append(image.numpy().reshape(data.channels, -1).astype(np.float64))
    if not images:
        return ""
    values = np.concatenate(images, axis=1)
    means = (values.mean(axis=1) - mean) / std
    stds = values.std(axis=1) / std
    far = (np.abs(means) > _FAR_MEAN) | (stds > _FAR_STD) | (stds < 1 / _FAR_STD)
    if not far.any():
        return ""
    channel = int(np.flatnonzero(far)[0])
    remedy = "Say model.normalise=data" if data.pixels is not None else "Prepare the data again"
    return (
        f"images normalised with mean {mean[channel]:.4g} and std {std[channel]:.4g} have mean "
        f"{means[channel]:.3g} and std {stds[channel]:.3g} in channel {channel}, far from 0 and 1. "
        f"{remedy}, or state model.mean and model.std."
    )
