"""Which engine runs: launcher and recipe agree, or the run does not start."""

from __future__ import annotations

import pytest

from mtl_dist.engine.connect import (
    Connection,
    EngineChoice,
    EngineSettings,
    choose,
    connect_without_engine,
)
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0"}
ACCELERATE_DDP = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}


def launched(stage: int | None, **more: str) -> dict[str, str]:
    """The environment that `accelerate launch --use_deepspeed --zero_stage <stage>` makes."""
    said = {} if stage is None else {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    return {**ACCELERATE_DDP, "ACCELERATE_USE_DEEPSPEED": "true", **said, **more}


def chosen(settings: EngineSettings, environment: dict[str, str]) -> EngineChoice:
    return choose(settings, environment)


@pytest.mark.parametrize("environment", [{}, TORCHRUN, ACCELERATE_DDP])
def test_without_a_word_from_anyone_it_is_accelerate(environment: dict[str, str]) -> None:
    assert chosen(EngineSettings(), environment) == EngineChoice("accelerate")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_launcher_decides_under_auto(stage: int) -> None:
    assert chosen(EngineSettings(), launched(stage)) == EngineChoice("deepspeed", stage)
    assert chosen(EngineSettings(kind="deepspeed"), launched(stage)) == EngineChoice("deepspeed", stage)


def test_deepspeed_without_a_stage_is_zero_2() -> None:
    assert chosen(EngineSettings(), launched(None)).zero_stage == 2
    assert chosen(EngineSettings(kind="deepspeed"), TORCHRUN).zero_stage == 2


@pytest.mark.parametrize("environment", [{}, TORCHRUN, ACCELERATE_DDP])
def test_the_recipe_decides_where_the_launcher_only_starts_processes(environment: dict[str, str]) -> None:
    assert chosen(EngineSettings(zero_stage=3), environment) == EngineChoice("deepspeed", 3)
    assert chosen(EngineSettings(offload_optimizer=True), environment) == EngineChoice("deepspeed", 2, True)


def test_offloading_is_what_either_asks_for() -> None:
    environment = launched(
        3,
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu",
        ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="none",
    )
    assert chosen(EngineSettings(), environment) == EngineChoice("deepspeed", 3, True, False)
    assert chosen(EngineSettings(offload_parameters=True), environment).offload_parameters


@pytest.mark.parametrize(
    ("settings", "environment", "problem"),
    [
        (EngineSettings(kind="accelerate"), launched(2), "engine.kind: expected deepspeed"),
        (EngineSettings(zero_stage=1), launched(2), "engine.zero_stage: expected 2, .* found 1"),
        (EngineSettings(kind="accelerate", zero_stage=1), {}, "engine.zero_stage: expected no value"),
        (EngineSettings(zero_stage=0, offload_optimizer=True), {}, "engine.offload_optimizer: expected zero"),
        (EngineSettings(zero_stage=2, offload_parameters=True), {}, "engine.offload_parameters: .* found 2"),
        (EngineSettings(), launched(4), "--zero_stage 0, 1, 2 or 3, found 4"),
        (EngineSettings(), {"ACCELERATE_USE_FSDP": "true"}, "found FSDP"),
        (EngineSettings(), {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"}, "dynamo_backend, found aot_eager"),
        (
            EngineSettings(),
            launched(2, ACCELERATE_DEEPSPEED_CONFIG_FILE="absent.json"),
            "absent.json: expected a configuration of DeepSpeed, found: .*No such file",
        ),
        (
            EngineSettings(zero_stage=1, deepspeed={"zero_optimization": {"stage": 2}}),
            {},
            "engine.zero_stage: expected 2, as engine.deepspeed has it, found 1",
        ),
        (EngineSettings(), launched(3, ACCELERATE_DEEPSPEED_ZERO3_INIT="true"), "--zero3_init_flag false"),
        (
            EngineSettings(),
            launched(3, ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="nvme"),
            "offloaded parameters, found nvme",
        ),
    ],
)
def test_a_contradiction_ends_the_run_before_it_starts(
    settings: EngineSettings, environment: dict[str, str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        chosen(settings, environment)


def test_every_contradiction_is_a_line_of_its_own() -> None:
    environment = launched(2, ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="nvme", ACCELERATE_USE_FSDP="true")
    with pytest.raises(UserError) as caught:
        chosen(EngineSettings(zero_stage=3), environment)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("size", "choice", "words"),
    [
        (1, EngineChoice("accelerate"), "one process"),
        (4, EngineChoice("accelerate"), "DDP on 4 ranks"),
        (2, EngineChoice("deepspeed", 2), "DeepSpeed ZeRO 2 on 2 ranks"),
        (2, EngineChoice("deepspeed", 3, True, True), "optimizer and weights in host memory"),
        (1, EngineChoice("deepspeed", 1), "there is nobody to share with"),
    ],
)
def test_the_log_can_say_what_runs(size: int, choice: EngineChoice, words: str) -> None:
    import torch

    world = World(rank=0, size=size, local_rank=0, device=torch.device("cpu"))
    connection = Connection(world, choice, build=lambda *_: pytest.fail("not built here"))
    assert words in connection.describe()


def test_evaluation_alone_needs_no_engine_whatever_launcher_and_recipe_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    for name, value in (launched(3, WORLD_SIZE="1") | {"ACCELERATE_MIXED_PRECISION": "bf16"}).items():
        monkeypatch.setenv(name, value)
    before = torch.distributed.is_initialized()
    world = connect_without_engine(EngineSettings(kind="accelerate"))
    assert (world.rank, world.size) == (0, 1)
    assert torch.distributed.is_initialized() == before
