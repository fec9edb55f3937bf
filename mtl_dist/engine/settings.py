"""What a recipe may say under `engine:`, and of its precision."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mtl_dist.config.settings import Settings
from mtl_dist.engine.deepspeed_keys import problems

Precision = Literal["fp32", "bf16", "fp16"]
ZeroStage = Literal[0, 1, 2, 3]


class EngineSettings(Settings):
    """What wraps the model for all ranks.

    `auto` is what `accelerate launch` was given (`--use_deepspeed --zero_stage 2`, or a preset of `launch/`),
    else DeepSpeed where something of it is asked for below, else accelerate: one process or DDP.
    """

    kind: Literal["auto", "accelerate", "deepspeed"] = "auto"
    """accelerate: one process or DDP; deepspeed: ZeRO."""
    zero_stage: ZeroStage | None = None
    """What DeepSpeed divides over the ranks: 1 optimizer state, 2 gradients too, 3 weights too; null: what
    the launcher says, or 2."""
    offload_optimizer: bool = False
    """Keep DeepSpeed's optimizer state in host memory, and update there (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep the weights' shards in host memory (ZeRO 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's own configuration, by its keys: buckets, overlap, offloading, ... docs/deepspeed.md
    says which are passed on, which the recipe says elsewhere, and which are refused."""
    tf32: bool = True
    """On GPUs, whether float32 products may round their factors to TF32."""

    @model_validator(mode="after")
    def _deepspeed_keys_are_known(self) -> EngineSettings:
        found = [line.removeprefix("engine.") for line in problems(self.deepspeed, "engine.deepspeed")]
        if found:
            raise ValueError("\n".join(found))
        return self
