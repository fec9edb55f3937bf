"""A trained model as one graph: raw images in, one output per task out, in the order of the tasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.prediction.exported import Network

_EXAMPLES = 2
"""Images that the graph is traced with: one would be taken for the only number there is."""


class Graph(nn.Module):
    """The network in float32, with normalisation inside, and where asked the resizing before it.

    Its outputs are before softmax and the like: (B, C), or (B, C, H, W) of maps at the model's size.
    """

    def __init__(self, network: Network, size: tuple[int, int], resize: bool) -> None:
        super().__init__()
        assert network.module is not None
        self.network = network.module
        self.tasks = tuple(network.tasks)
        self.size = size if resize else None
        self.is_whole = network.facts.image_dtype == "uint8"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.size is not None:
            images = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True)
            if self.is_whole:  # as images of whole numbers are resized elsewhere
                images = images.round().clamp(0, 255)
        outputs = self.network(images)
        return {task: outputs[task].float() for task in self.tasks}


def check_resize(data: DataSettings) -> None:
    """Refuse to put into the graph what depends on the image's own proportions, or is the user's code.

    Raises:
        UserError: it is `crop`, `pad` or a centre crop, or there are transforms that prediction keeps.
    """
    if data.resize != "stretch":
        raise UserError(
            f"--resize-inside: expected a run with data.resize: stretch, found {data.resize}. Export without "
            "it, and resize as the description says."
        )
    if data.user_transforms(training=False):
        raise UserError(
            "--resize-inside: expected no data.transforms that prediction keeps, found some. Leave it out."
        )


def traced(
    graph: Graph, network: Network, size: tuple[int, int], any_size: bool
) -> torch.export.ExportedProgram:
    """The graph as `torch.export` has it, for any number of images and, where asked, of any size.

    Raises:
        UserError: the model is of parts that torch.export cannot trace, or takes only one size.
    """
    dtype = torch.uint8 if network.facts.image_dtype == "uint8" else torch.float32
    shape = (_EXAMPLES, network.facts.channels, *size)
    images = torch.zeros(shape, dtype=dtype)
    dynamic = torch.export.Dim.DYNAMIC
    sizes = {2: dynamic, 3: dynamic} if any_size or graph.size is not None else {}
    try:
        with torch.no_grad():
            return torch.export.export(graph.cpu().eval(), (images,), dynamic_shapes=({0: dynamic, **sizes},))
    except Exception as error:  # torch has a dozen of kinds, from its compiler and its exporter
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if any_size:
            traced(graph, network, size, False)  # where this fails too, the size is not why
            raise UserError(
                f"--any-size: expected a model that takes images of any size, found one of "
                f"model.backbone: {network.recipe.model.backbone_name} that fixes {size[0]} x {size[1]} "
                f"({reason.rstrip('.')}). Leave it out, or use --resize-inside: a graph that brings "
                "images of any size to that."
            ) from None
        option = "Use --format safetensors."
        raise UserError(
            f"export: expected a model that torch.export can trace, found: {reason} {option}"
        ) from None
