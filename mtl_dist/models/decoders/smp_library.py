"""What decoders of segmentation-models-pytorch have in common: the library, first weights, norms.

Shape legend: batch.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from mtl_dist.errors import NotInstalledError
from mtl_dist.models.norms import convert_norms
from mtl_dist.models.settings import DecoderNorm

LEAST_STRIDE = 4
"""Their finest map; a backbone whose maps are all deeper begins at its own finest."""

Width = Annotated[int, Field(ge=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def library_class(kind: str, module: str, name: str) -> Any:
    """A class of the library: NAME of `segmentation_models_pytorch.decoders.MODULE.decoder`.

    Raises:
        NotInstalledError: the library is not installed.
    """
    try:
        return getattr(
            importlib.import_module(f"segmentation_models_pytorch.decoders.{module}.decoder"), name
        )
    except (ImportError, AttributeError) as error:
        raise NotInstalledError(
            f"model.decoder: expected segmentation-models-pytorch >= 0.5, which has {kind}, found none "
            f"({error}). Install it: pip install 'mtl-dist[decoders]'."
        ) from None


def made_ready(decoder: nn.Module, norm: DecoderNorm) -> Any:
    """The library's decoder with its first weights drawn as the library's models do, and with our norms."""
    initialization: Any = importlib.import_module("segmentation_models_pytorch.base.initialization")
    initialization.initialize_decoder(decoder)
    convert_norms(decoder, norm)
    return decoder


def output_layer(width: int, num_outputs: int, dropout: float) -> nn.Sequential:
    """Whole channels dropped in training, then a 1x1 convolution to the outputs."""
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_outputs, 1))


def used_strides(channels: Mapping[int, int]) -> list[int]:
    """The strides from 4 on of those that there are, or all."""
    return sorted(stride for stride in channels if stride >= LEAST_STRIDE) or sorted(channels)
