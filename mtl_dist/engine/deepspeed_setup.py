"""DeepSpeed made to run as a library: imported quietly, joined to the launcher's group, configured."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mtl_dist.engine.deepspeed_keys import passed
from mtl_dist.engine.settings import ZeroStage
from mtl_dist.engine.world import use_cpu

LARGEST_BUCKET = 2**25
"""Elements whose gradients travel together: 128 MB. DeepSpeed allocates the buffer whole, so a small model
gets a smaller one."""

SMALL_WEIGHT = 100_000
"""Elements up to which ZeRO 3 keeps a weight whole between steps: gathering it costs more than it saves."""


def import_deepspeed() -> ModuleType:
    """The `deepspeed` module, set to this run's devices. Takes seconds the first time."""
    if use_cpu():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It warns of what is meant: an optimizer of the caller's, inputs that are not tensors.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls what torch has renamed: once a rank and place, which no user can fix.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if use_cpu():
        # Otherwise the first run on a machine compiles a shared-memory all-reduce, for minutes.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def deepspeed_config(
    root: nn.Module,
    stage: ZeroStage,
    offload_optimizer: bool,
    offload_parameters: bool,
    device: torch.device,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration of `deepspeed.initialize`; whatever is ours is switched off here.

    What is passed on of the `given` one stands in the place of our defaults.
    """
    size = sum(parameter.numel() for parameter in root.parameters())
    on_host: dict[str, Any] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(size, LARGEST_BUCKET),
        "round_robin_gradients": False,
        "stage3_param_persistence_threshold": SMALL_WEIGHT,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = dict(on_host)
    if offload_parameters:
        zero["offload_param"] = dict(on_host)
    config: dict[str, Any] = {
        # Batches are cut by the loader; DeepSpeed wants a number, and uses it for its own log only.
        "train_micro_batch_size_per_gpu": 1,
        # The window's length varies: the boundary is set at every micro-batch.
        "gradient_accumulation_steps": 1,
        # Its default is 1.0. The recipe's norm is set at every step.
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # It would wait for the GPU at every forward.
        "timers": {"throughput": {"enabled": False}},
    }
    _merge(config, passed(given))
    return config


def _merge(config: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value
