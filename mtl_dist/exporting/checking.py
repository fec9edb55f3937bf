"""An exported model held against the run's, by the names of the outputs, before its file is kept."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage
from mtl_dist.errors import UserError
from mtl_dist.prediction.exported import Network
from mtl_dist.prediction.inputs import check_given, inputs_of
from mtl_dist.recipe import Recipe

TOLERANCE = 1e-4
"""Of outputs before softmax, as a fraction of the task's largest where that is above 1."""
NUM_IMAGES = 8
_SEED = 0


@dataclass(frozen=True)
class Images:
    """Decoded images to check with, each in its own size, and where they are from."""

    originals: list[Tensor]
    source: str


def images_for(recipe: Recipe, network: Network, given: Path | None) -> Images:
    """Up to 8 images: those given, else of the run's data where it still is, else made-up ones.

    Raises:
        UserError: what is given has no image that can be read.
    """
    place = given if given is not None else recipe.data.train[0].path
    originals: list[Tensor] = []
    try:
        check_given([str(place)])
        for one in islice(inputs_of([str(place)], None, io.BytesIO(), lambda line: None), 4 * NUM_IMAGES):
            try:
                originals.append(decode_image(one.data, network.facts.channels, network.facts.image_dtype))
            except UnreadableImage:
                continue
            if len(originals) == NUM_IMAGES:
                break
    except UserError:
        if given is not None:
            raise
    if originals:
        return Images(originals, str(place))
    if given is not None:
        raise UserError(f"--images {given}: expected an image that the model takes, found none.")
    generator = torch.Generator().manual_seed(_SEED)
    shape = (NUM_IMAGES, network.facts.channels, *network.facts.image_size)
    noise = 255 * torch.rand(shape, generator=generator)
    dtype = torch.uint8 if network.facts.image_dtype == "uint8" else torch.float32
    return Images(list(noise.to(dtype)), "made-up images, as the run's data is not where it was")


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> float:
    """The largest difference of outputs of one name, each as a fraction of its task's largest above 1.

    Raises:
        UserError: an output is missing, of another shape, or differs by more than is rounding.
    """
    worst = 0.0
    for task, output in expected.items():
        other = found.get(task)
        if other is None or other.shape != output.shape:
            shape = None if other is None else tuple(other.shape)
            raise UserError(f"{what}: expected {task} of shape {tuple(output.shape)}, found {shape}.")
        scale = max(1.0, float(output.abs().max()))
        error = float((output - other.to(output)).abs().max()) / scale
        if not error <= TOLERANCE:
            raise UserError(
                f"{what}: expected {task} to differ by {TOLERANCE:g} or less from the run's own, found "
                f"{error:.2g}. Nothing was kept; --format safetensors has the weights themselves."
            )
        worst = max(worst, error)
    return worst
