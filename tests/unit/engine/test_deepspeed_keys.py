"""A configuration of DeepSpeed, key by key: passed on, said by the recipe, or refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtl_dist.engine.connect import choose
from mtl_dist.engine.deepspeed_keys import KEYS, flat, passed, problems, said, table
from mtl_dist.engine.deepspeed_setup import deepspeed_config
from mtl_dist.engine.launcher import Launcher
from mtl_dist.engine.settings import EngineSettings
from mtl_dist.errors import UserError
from mtl_dist.recipe import load_recipe, with_launcher

ROOT = Path(__file__).parents[3]
RECIPE: dict[str, Any] = {
    "tasks": {"digit": {"kind": "classification"}},
    "data": {"train": [{"path": "data"}], "image_size": 8},
}
OF_OTHERS = {
    # As Hugging Face's documentation has it.
    "fp16": {"enabled": "auto", "loss_scale": "auto"},
    "bf16": {"enabled": True},
    "optimizer": "auto",
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 1000000,
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.5,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "activation_checkpointing": {"enabled": False},
}


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def launched(config: Path | None = None, **more: str) -> dict[str, str]:
    said = {} if config is None else {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    return {"ACCELERATE_USE_DEEPSPEED": "true", **said, **more}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_passed_on_or_said_by_the_recipe_or_refused_by_its_name_and_reason(key: str) -> None:
    rule = KEYS[key]
    value: Any = "cpu" if key.endswith(".device") else 2
    found = problems(nested(key, value), "engine.deepspeed")
    if rule.how == "refused":
        assert found == [f"engine.deepspeed.{key}: expected no value, found 2: {rule.why}. Remove it."]
        for off in (None, False, "auto", {"enabled": False}):
            assert problems(nested(key, off), "") == []
        return
    assert found == []
    handed = dict(flat(passed(nested(key, value))))
    if rule.how == "passed" and key != "zero_allow_untested_optimizer":
        assert handed == {key: value}
        assert passed(nested(key, "auto")) == {}
    else:
        assert handed == {}


def test_what_is_passed_on_stands_in_the_place_of_our_defaults_and_nothing_else_changes() -> None:
    def built(given: dict[str, Any]) -> dict[str, Any]:
        return dict(flat(deepspeed_config(nn.Linear(3, 3), 2, True, False, torch.device("cpu"), given)))

    ours = built({})
    given = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 7,
            "overlap_comm": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        "communication_data_type": "fp32",
        "gradient_clipping": 3.0,
    }
    assert built(given) == ours | {
        "zero_optimization.reduce_bucket_size": 7,
        "zero_optimization.overlap_comm": True,
        "zero_optimization.offload_optimizer.pin_memory": True,
        "communication_data_type": "fp32",
    }


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    assert table() in (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")


def test_a_configuration_as_others_write_it_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(OF_OTHERS))
    choice = choose(EngineSettings(), launched(path))
    assert (choice.zero_stage, choice.offload_optimizer, choice.offload_parameters) == (3, True, False)
    assert said(OF_OTHERS) == {
        "engine.zero_stage": 3,
        "train.precision": "bf16",
        "optim.clip_norm": 0.5,
    }
    in_recipe = load_recipe({**RECIPE, "engine": {"deepspeed": OF_OTHERS}})
    assert choose(in_recipe.engine, {}) == choice
    for recipe, environment in ((load_recipe(RECIPE), launched(path)), (in_recipe, {})):
        taken, notes = with_launcher(recipe, environment)
        assert (taken.train.precision, taken.optim.clip_norm) == ("bf16", 0.5)
        assert len(notes) == 2


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"zero_optimisation": {}}, "deepspeed.zero_optimisation: .*Did you mean zero_optimization.stage"),
        ({"zero_optimization": {"overlap_com": True}}, "Did you mean zero_optimization.overlap_comm"),
        ({"activation_checkpointing": {"partition_activations": True}}, "model.checkpointing in the recipe"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "expected none or cpu, found 'nvme'"),
        ({"zero_optimization": {"stage": 4}}, "expected 0, 1, 2 or 3, found 4"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_with_its_key(config: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        load_recipe({**RECIPE, "engine": {"deepspeed": config}})
    assert str(raised.value).startswith("engine.deepspeed")
    assert len(str(raised.value).splitlines()) == 1


# ---------------------------------------------------------------- accelerate config
CLIP = {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
FOUR = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}


def test_what_the_recipe_does_not_say_is_taken_over_from_an_accelerate_config() -> None:
    recipe, notes = with_launcher(load_recipe(RECIPE), launched(**CLIP, **BF16, **FOUR))
    assert (recipe.train.precision, recipe.train.accumulation) == ("bf16", 4)
    assert recipe.optim.clip_norm == 1.0
    assert "train.precision is bf16, as accelerate's mixed_precision has it." in notes
    assert with_launcher(recipe, {}) == (recipe, [])
    plain, _ = with_launcher(load_recipe(RECIPE), {**FOUR, **COMPILED})
    assert (plain.train.accumulation, plain.train.compile) == (4, True)
    without, notes = with_launcher(load_recipe(RECIPE), {"ACCELERATE_MIXED_PRECISION": "no"})
    assert (without, notes) == (load_recipe(RECIPE), [])


def test_what_both_say_alike_is_no_contradiction() -> None:
    said = ["train.precision=bf16", "optim.clip_norm=1.0", "train.accumulation=4"]
    recipe = load_recipe(RECIPE, said)
    assert with_launcher(recipe, launched(**CLIP, **BF16, **FOUR)) == (recipe, [])


@pytest.mark.parametrize(
    ("override", "environment", "line"),
    [
        ("train.precision=fp32", BF16, "train.precision: expected bf16, .* found fp32"),
        ("train.precision=fp16", BF16, "train.precision: expected bf16, .* found fp16"),
        ("optim.clip_norm=2.0", launched(**CLIP), "optim.clip_norm: expected 1.0, .* found 2.0"),
        ("train.accumulation=2", launched(**FOUR), "train.accumulation: expected 4, .* found 2"),
        (
            "train.micro_batch=2",
            launched(**FOUR),
            "train.accumulation: expected 4, .* found train.micro_batch",
        ),
        ("train.compile=false", COMPILED, "train.compile: expected True, .* found False"),
        ("train.epochs=1", {"ACCELERATE_MIXED_PRECISION": "fp8"}, "precision: .*found 'fp8'"),
    ],
)
def test_what_the_recipe_says_otherwise_is_refused(
    override: str, environment: dict[str, str], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        with_launcher(load_recipe(RECIPE, [override]), environment)


def test_a_launcher_that_contradicts_its_own_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}))
    with pytest.raises(UserError, match=r"optim.clip_norm: expected one value, found 1.0 .* and 0.5"):
        Launcher(launched(path, **CLIP)).said()
    with pytest.raises(UserError, match=r"--zero_stage 1, as .* has it, found 2"):
        choose(EngineSettings(), launched(path, ACCELERATE_DEEPSPEED_ZERO_STAGE="2"))
