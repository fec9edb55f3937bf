"""Every key of a DeepSpeed configuration: passed to it, said by the recipe, or refused, and why.

`engine: {deepspeed: {...}}` in a recipe and `accelerate launch --deepspeed_config_file` are read alike.
Nothing of DeepSpeed is imported here, so that a recipe is checked at once. docs/deepspeed.md has `table()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtl_dist.config.errors import nearest

How = Literal["passed", "recipe", "refused"]

AUTO = "auto"
"""What a key may be instead of a value: then it is filled."""


@dataclass(frozen=True)
class Rule:
    """What becomes of a key.

    passed   DeepSpeed gets the value
    recipe   a setting of the recipe says it: the value is taken over where the recipe says nothing, and
             refused where it says otherwise
    refused  for the reason `why`; a value that switches it off is let through
    """

    how: How
    why: str = ""
    gpu: bool = False
    """DeepSpeed has it for GPUs alone."""


def _passed(why: str = "", gpu: bool = False) -> Rule:
    return Rule("passed", why, gpu)


def _recipe(setting: str) -> Rule:
    return Rule("recipe", setting)


def _refused(why: str) -> Rule:
    return Rule("refused", why)


_SCALE = _refused("the loss scale of train.precision fp16 is the same under every engine")
_CHECKPOINT = _refused("checkpoints are those of the run folder, the same under every engine")
_NVME = _refused("checkpoints are gathered from memory, where state on NVMe is not")
_MONITOR = _refused("`tracking:` in the recipe")
_LAYOUT = _refused("a checkpoint is gathered from shards as DeepSpeed lays them out without it")
_WHOLE = _refused("models are built whole, then divided")
_PARALLEL = _refused("a model is not divided that way")

KEYS: dict[str, Rule] = {
    # ---- batches, clipping, precision: the recipe's
    "train_batch_size": _recipe("train.global_batch"),
    "train_micro_batch_size_per_gpu": _recipe("train.micro_batch"),
    "gradient_accumulation_steps": _recipe("train.accumulation"),
    "gradient_clipping": _recipe("optim.clip_norm"),
    "fp16.enabled": _recipe("train.precision"),
    "bf16.enabled": _recipe("train.precision"),
    "torch_autocast.enabled": _recipe("train.precision"),
    "torch_autocast.dtype": _recipe("train.precision"),
    "torch_autocast.lower_precision_safe_modules": _refused("autocast decides by operation"),
    "fp16.auto_cast": _refused("autocast is the root module's"),
    "fp16.loss_scale": _SCALE,
    "fp16.initial_scale_power": _SCALE,
    "fp16.loss_scale_window": _SCALE,
    "fp16.hysteresis": _SCALE,
    "fp16.consecutive_hysteresis": _SCALE,
    "fp16.min_loss_scale": _SCALE,
    "fp16.fp16_master_weights_and_grads": _refused("weights and gradients are float32"),
    "bf16.check_overflow": _refused("steps that are not finite are skipped under every precision"),
    "bf16.immediate_grad_update": _refused("the window's gradients are applied together"),
    "bf16.bf16_master_weights_and_grads": _refused("weights and gradients are float32"),
    "bf16.bf16_optimizer_states": _refused("the optimizer's state is float32"),
    "amp": _refused("Apex is superseded by train.precision"),
    "data_types": _refused("gradients are accumulated in float32"),
    # ---- what DeepSpeed would otherwise build
    "optimizer": _refused("`optim:` in the recipe"),
    "scheduler": _refused("optim.schedule in the recipe"),
    "activation_checkpointing": _refused("model.checkpointing in the recipe: auto, stage or block"),
    "zero_allow_untested_optimizer": _passed("always true"),
    "zero_force_ds_cpu_optimizer": _refused("the optimizer is torch's own, fused, on the host too"),
    "compile": _refused("train.compile in the recipe"),
    "dataloader_drop_last": _refused("no sample is dropped"),
    "data_efficiency": _refused("data.sampling in the recipe"),
    "curriculum_learning": _refused("data.sampling in the recipe"),
    "progressive_layer_drop": _refused("it is for transformers of language"),
    "eigenvalue": _refused("it is for quantised training"),
    "quantize_training": _refused("weights are float32"),
    "compression_training": _refused("weights are float32"),
    "weight_quantization": _refused("weights are float32"),
    "checkpoint": _CHECKPOINT,
    "load_universal_checkpoint": _CHECKPOINT,
    "nebula": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "elasticity": _refused("a run goes on with any number of ranks by itself"),
    "autotuning": _refused("it would start trainings of its own"),
    "aio": _NVME,
    "hybrid_engine": _refused("it is for language models that generate"),
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "sparse_attention": _refused("it is for transformers of language"),
    "sparse_gradients": _refused("there are no sparse embeddings"),
    "managed_gradient_accumulation": _refused("a window's end is set at every micro-batch"),
    "disable_allgather": _refused("weights would not be updated"),
    "gradient_allreduce_op": _refused("losses are scaled for the mean"),
    # ---- communication and what it says
    "communication_data_type": _passed("fp32, fp16 or bf16: what gradients travel in"),
    "prescale_gradients": _passed(),
    "gradient_predivide_factor": _passed(),
    "comms_logger": _passed(),
    "flops_profiler": _passed(),
    "wall_clock_breakdown": _passed(),
    "memory_breakdown": _passed(),
    "steps_per_print": _passed(),
    "dump_state": _passed(),
    "log_level": _passed(),
    "disable_python_gc": _refused("garbage is collected by all ranks at once already"),
    "timers": _refused("they would wait for the GPU at every forward"),
    # ---- ZeRO
    "zero_optimization.stage": _recipe("engine.zero_stage"),
    "zero_optimization.contiguous_gradients": _passed(),
    "zero_optimization.reduce_scatter": _passed(),
    "zero_optimization.reduce_bucket_size": _passed("by default 2^25, or the model's size"),
    "zero_optimization.use_multi_rank_bucket_allreduce": _passed(),
    "zero_optimization.allgather_partitions": _passed(),
    "zero_optimization.allgather_bucket_size": _passed(),
    "zero_optimization.overlap_comm": _passed(),
    "zero_optimization.sub_group_size": _passed(),
    "zero_optimization.ignore_unused_parameters": _passed(),
    "zero_optimization.memory_efficient_linear": _passed(),
    "zero_optimization.log_trace_cache_warnings": _passed(),
    "zero_optimization.enable_sanity_checks": _passed(),
    "zero_optimization.stage3_prefetch_bucket_size": _passed(),
    "zero_optimization.stage3_param_persistence_threshold": _passed("by default 100 000"),
    "zero_optimization.stage3_model_persistence_threshold": _passed(),
    "zero_optimization.stage3_max_live_parameters": _passed(),
    "zero_optimization.stage3_max_reuse_distance": _passed(),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _passed(),
    "zero_optimization.stage3_allgather_sequential": _passed(),
    "zero_optimization.zero_hpz_partition_size": _passed("ZeRO++", gpu=True),
    "zero_optimization.zero_quantized_weights": _passed("ZeRO++", gpu=True),
    "zero_optimization.zero_quantized_nontrainable_weights": _passed("ZeRO++", gpu=True),
    "zero_optimization.zero_quantized_gradients": _passed("ZeRO++", gpu=True),
    "zero_optimization.offload_optimizer.device": _passed(
        "none or cpu; engine.offload_optimizer says it too"
    ),
    "zero_optimization.offload_optimizer.pin_memory": _passed("by default true on GPUs"),
    "zero_optimization.offload_optimizer.buffer_count": _NVME,
    "zero_optimization.offload_optimizer.fast_init": _NVME,
    "zero_optimization.offload_optimizer.nvme_path": _NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NVME,
    "zero_optimization.offload_optimizer.ratio": _refused("the whole optimizer is on one device"),
    "zero_optimization.offload_optimizer.super_offload": _refused("the optimizer is torch's own"),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _refused("the optimizer is torch's own"),
    "zero_optimization.offload_param.device": _passed("none or cpu; engine.offload_parameters says it too"),
    "zero_optimization.offload_param.pin_memory": _passed("by default true on GPUs"),
    "zero_optimization.offload_param.buffer_count": _NVME,
    "zero_optimization.offload_param.buffer_size": _NVME,
    "zero_optimization.offload_param.max_in_cpu": _NVME,
    "zero_optimization.offload_param.nvme_path": _NVME,
    "zero_optimization.cpu_offload": _refused("DeepSpeed's old name: write offload_optimizer"),
    "zero_optimization.cpu_offload_param": _refused("DeepSpeed's old name: write offload_param"),
    "zero_optimization.cpu_offload_use_pin_memory": _refused("DeepSpeed's old name: write pin_memory"),
    "zero_optimization.compute_grad_norm": _refused("the norm is logged and clipped by"),
    "zero_optimization.load_from_fp32_weights": _CHECKPOINT,
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINT,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _refused("`optim:` in the recipe"),
    "zero_optimization.override_module_apply": _WHOLE,
    "zero_optimization.stage3_module_granularity_threshold": _refused("heads are entered one by one"),
    "zero_optimization.leaf_module": _refused("heads are entered one by one"),
    "zero_optimization.legacy_stage1": _LAYOUT,
    "zero_optimization.round_robin_gradients": _LAYOUT,
    "zero_optimization.parameter_alignment": _LAYOUT,
    "zero_optimization.zenflow": _refused("the whole optimizer steps together"),
}
"""By dotted key; a key without a dot stands for all below it."""

_SECTIONS = {key[:at] for key in KEYS for at, letter in enumerate(key) if letter == "."}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by the keys of the table; what the table does not have stands under its own name."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in _SECTIONS and isinstance(value, Mapping):
            yield from flat(value, f"{key}.")
        elif not (key in _SECTIONS and value in (None, AUTO)):
            yield key, value


def problems(config: Mapping[str, Any], where: str) -> list[str]:
    """What of a configuration is refused, one line each; `where` it stands."""
    found = []
    for key, value in flat(config):
        rule = KEYS.get(key)
        if rule is None:
            near = nearest(key, list(KEYS))
            found.append(
                f"{where}.{key}: expected a key of DeepSpeed's configuration, found another. "
                + (f"Did you mean {near}?" if near else "docs/deepspeed.md has them all.")
            )
        elif rule.how == "refused" and not _is_off(value):
            found.append(f"{where}.{key}: expected no value, found {value!r}: {rule.why}. Remove it.")
        elif key.endswith(".device") and value not in (None, AUTO, "none", "cpu"):
            found.append(f"{where}.{key}: expected none or cpu, found {value!r}: {_NVME.why}. Use cpu.")
        elif key.endswith(".stage") and value not in (AUTO, 0, 1, 2, 3):
            found.append(f"{where}.{key}: expected 0, 1, 2 or 3, found {value!r}.")
    return found


def _is_off(value: Any) -> bool:
    """Whether a value asks for nothing: `{"enabled": false}`, for example."""
    if isinstance(value, Mapping):
        return not value or value.get("enabled") is False
    return value is None or value is False or value == AUTO


def gpu_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of the configuration that only GPUs have, and that ask for something."""
    return [
        key
        for key, value in flat(config)
        if KEYS[key].gpu and not _is_off(value) and (value is True or value not in (0, 1))
    ]


def passed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed gets of a configuration without problems, nested as it was."""
    result: dict[str, Any] = {}
    for key, value in flat(config):
        if KEYS[key].how != "passed" or value == AUTO or key == "zero_allow_untested_optimizer":
            continue
        *sections, name = key.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return result


def said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of the recipe's settings, by setting: `{"train.precision": "bf16"}`."""
    values = {key: value for key, value in flat(config) if value not in (None, AUTO)}
    found = {
        KEYS[key].why: value
        for key, value in values.items()
        if KEYS[key].how == "recipe" and KEYS[key].why != "train.precision"
    }
    if values.get("fp16.enabled") is True:
        found["train.precision"] = "fp16"
    elif values.get("bf16.enabled") is True:
        found["train.precision"] = "bf16"
    elif values.get("torch_autocast.enabled") is True:
        dtype = str(values.get("torch_autocast.dtype", "bfloat16"))
        found["train.precision"] = "fp16" if dtype in ("fp16", "float16", "half", "torch.float16") else "bf16"
    if not found.get("optim.clip_norm", True):
        del found["optim.clip_norm"]  # DeepSpeed's 0: no clipping
    return found


def offloads(config: Mapping[str, Any], what: Literal["optimizer", "param"]) -> bool:
    """Whether a configuration keeps the optimizer's state, or the weights, in host memory."""
    return dict(flat(config)).get(f"zero_optimization.offload_{what}.device") == "cpu"


def table() -> str:
    """The table of the docs."""
    lines = ["| key | | |", "|---|---|---|"]
    for key, rule in KEYS.items():
        what = {"passed": "passed", "recipe": f"`{rule.why}`", "refused": "refused"}[rule.how]
        why = "" if rule.how == "recipe" else rule.why
        if rule.gpu:
            why = f"{why}; GPUs only; no test of ours has run it"
        lines.append(f"| `{key}` | {what} | {why} |")
    return "\n".join(lines) + "\n"
