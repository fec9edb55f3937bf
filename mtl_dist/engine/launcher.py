"""What `accelerate launch` says in the environment; torchrun and others say nothing of an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from mtl_dist.engine import deepspeed_keys
from mtl_dist.engine.settings import ZeroStage
from mtl_dist.errors import UserError


class Launcher:
    """The launcher's wishes, as its environment variables have them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.deepspeed = self._says("ACCELERATE_USE_DEEPSPEED")

    @property
    def zero_stage(self) -> ZeroStage | None:
        """The stage of `--zero_stage`, or of the configuration file.

        Raises:
            UserError: no stage of DeepSpeed's, or the two differ.
        """
        value = self._environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        in_file = deepspeed_keys.said(self.config).get("engine.zero_stage")
        if not self.deepspeed or (value is None and in_file is None):
            return None
        if value is None or (in_file is not None and str(in_file) == value):
            return cast(ZeroStage, in_file)
        if in_file is not None:
            raise UserError(
                f"accelerate launch: expected --zero_stage {in_file}, as {self._config_path} has it, found "
                f"{value}. Remove one of them."
            )
        if value not in ("0", "1", "2", "3"):
            raise UserError(f"accelerate launch: expected --zero_stage 0, 1, 2 or 3, found {value}.")
        return cast(ZeroStage, int(value))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The file of `--deepspeed_config_file`; empty without one.

        Raises:
            UserError: not JSON, or keys that are refused, one line each.
        """
        path = self._config_path
        if path is None:
            return {}
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: expected a configuration of DeepSpeed, found: {error}.") from None
        if not isinstance(config, dict):
            raise UserError(f"{path}: expected a configuration of DeepSpeed, found {type(config).__name__}.")
        problems = deepspeed_keys.problems(config, str(path))
        if problems:
            raise UserError("\n".join(problems))
        return config

    @property
    def _config_path(self) -> Path | None:
        name = self._environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        return None if not self.deepspeed or name.lower() == "none" else Path(name)

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        return self._device(what) == "cpu" or deepspeed_keys.offloads(self.config, what)

    def said(self) -> dict[str, tuple[Any, str]]:
        """By setting of the recipe what was said of it, and where.

        Raises:
            UserError: a value is no number, or two places say different things.
        """
        found: dict[str, tuple[Any, str]] = {}
        mixed = self._environment.get("ACCELERATE_MIXED_PRECISION", "no")
        if mixed != "no":
            found["train.precision"] = (mixed, "accelerate's mixed_precision")
        if self._environment.get("ACCELERATE_DYNAMO_BACKEND", "").lower() == "inductor":
            found["train.compile"] = (True, "accelerate's dynamo_backend")
        for setting, variable, nothing, number in (
            ("optim.clip_norm", "ACCELERATE_GRADIENT_CLIPPING", "none", float),
            ("train.accumulation", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", int),
        ):
            text = self._environment.get(variable, nothing)
            if text in (nothing, deepspeed_keys.AUTO):
                continue
            name = variable.removeprefix("ACCELERATE_").lower()
            try:
                found[setting] = (number(text), f"accelerate's {name}")
            except ValueError:
                raise UserError(f"accelerate launch: expected a number as {name}, found {text}.") from None
        for setting, value in deepspeed_keys.said(self.config).items():
            if setting == "engine.zero_stage":
                continue
            before = found.setdefault(setting, (value, str(self._config_path)))
            if before[0] != value:
                raise UserError(
                    f"{setting}: expected one value, found {before[0]} of {before[1]} and {value} of "
                    f"{self._config_path}. Remove one of them."
                )
        return found

    def problems(self) -> list[str]:
        """What the launcher was given that we do not have."""
        problems = [
            f"accelerate launch: expected one process, DDP or DeepSpeed, found {name}. It is not supported."
            for variable, name in (
                ("ACCELERATE_USE_FSDP", "FSDP"),
                ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
                ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
            )
            if self._says(variable)
        ]
        backend = self._environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
        if backend not in ("", "no", "inductor"):
            problems.append(
                f"accelerate launch: expected no or inductor as dynamo_backend, found {backend}. "
                "It is not supported."
            )
        if not self.deepspeed:
            return problems
        if self.zero_stage == 3 and self._says("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
            problems.append(
                "accelerate launch: expected --zero3_init_flag false: models are built whole, then divided."
            )
        problems += [
            f"accelerate launch: expected none or cpu as device of the offloaded {word}, found "
            f"{self._device(what)}. Use cpu."
            for what, word in (("optimizer", "optimizer"), ("param", "parameters"))
            if self._device(what) not in ("none", "cpu")
        ]
        return problems

    def _device(self, what: str) -> str:
        if not self.deepspeed:
            return "none"
        return self._environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")

    def _says(self, variable: str) -> bool:
        return self._environment.get(variable, "").lower() in ("1", "true", "yes")
