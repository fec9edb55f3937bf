"""`torch.compile` for a model that is trained: its backbones and heads, each a graph of its own.

They are compiled in place, so names in a checkpoint, hooks of an engine and `model.features` stay what they
are, and where the shared part meets the heads there is a tensor between two graphs: gradients can be read
there. Losses and balancing are not compiled. Dropout draws other numbers than without compilation.
"""

from __future__ import annotations

import os
import shutil

import torch

from mtl_dist.errors import UserError
from mtl_dist.models.multitask import MultitaskModel

_COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("cc", "gcc", "clang"))}
"""By kind of device: what compiles the code that torch writes, and where a user names it."""

_LEAST_VARIANTS = 16
"""Of each part: training, evaluation, looking at gradients before a step, and those at another batch size."""


def compile_parts(model: MultitaskModel, device: torch.device, recomputing: bool) -> None:
    """Have every backbone and every head compiled at its first use on `device`, which takes minutes.

    Args:
        recomputing: whether gradient checkpointing is on

    Raises:
        UserError: this machine has no compiler for the code that torch writes.
    """
    _require_compiler(device)
    parts = model.parts()
    _configure(len(parts), recomputing)
    for part in parts:
        part.compile()


def _require_compiler(device: torch.device) -> None:
    variable, names = _COMPILERS["cpu" if device.type == "cpu" else "cuda"]
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([named] if named else names)):
        raise UserError(
            f"train.compile: expected a compiler ({', '.join(names)}, or the one named by {variable}), found "
            f"{named or 'none'}. Install one, or set train.compile to false."
        )


def _configure(num_parts: int, recomputing: bool) -> None:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    # The tasks' gradients are read from one graph, one after another; donated buffers are gone at once.
    functorch.donated_buffer = False
    # All parts share the code of nn.Module.__call__, whose variants are counted together.
    dynamo.recompile_limit = max(dynamo.recompile_limit, num_parts * _LEAST_VARIANTS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, num_parts * _LEAST_VARIANTS)
    if recomputing:
        # Inside DDP a graph is split at the bucket boundaries, which it does not do to recomputed pieces.
        dynamo.optimize_ddp = False
