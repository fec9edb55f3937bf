"""Whether the images of a run become what a network expects: mean 0 and standard deviation 1, about."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.inspect import spread
from mtl_dist.data.loader import Data, Source
from mtl_dist.data.reader import UnreadableSample

_LOOKED_AT = 16
_FAR_MEAN, _FAR_STD = 2.0, 5.0


def odd_normalisation(data: Data, mean: Sequence[float], std: Sequence[float]) -> Iterator[str]:
    """One line for each source whose normalised images are far from mean 0 and deviation 1.

    A few images of each source of each split are looked at.
    """
    for source in itertools.chain.from_iterable(data.sources.values()):
        values = _values_of(source, data)
        if values is None:
            continue
        means = (values.mean(axis=1) - mean) / std
        stds = values.std(axis=1) / std
        far = (np.abs(means) > _FAR_MEAN) | (stds > _FAR_STD) | (stds < 1 / _FAR_STD)
        if not far.any():
            continue
        channel = int(np.flatnonzero(far)[0])
        remedy = "Say model.normalise=data" if data.pixels is not None else "Prepare the data again"
        yield (
            f"{source.facts.split} of {source.facts.path.name}: images normalised with mean "
            f"{mean[channel]:.4g} and std {std[channel]:.4g} have mean {means[channel]:.3g} and std "
            f"{stds[channel]:.3g} in channel {channel}, far from 0 and 1. {remedy}, or state model.mean and "
            "model.std."
        )


def _values_of(source: Source, data: Data) -> np.ndarray | None:
    """The values of each channel in a few images, (C, number)."""
    images = []
    for row in spread(source.reader.num_samples, _LOOKED_AT):
        try:
            image = decode_image(bytes(source.reader.read(row).image), data.channels, data.image_dtype)
        except (UnreadableSample, UnreadableImage):
            continue  # the loader speaks of it
        images.append(image.numpy().reshape(data.channels, -1).astype(np.float64))
    return np.concatenate(images, axis=1) if images else None
