"""Runs with adapters: resuming, every engine, beginning with others' weights, exports, answers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import mtl_dist
from mtl_dist.assemble import read_trained
from mtl_dist.errors import UserError
from mtl_dist.exporting.export import export_run
from mtl_dist.models.weights import is_adapter
from mtl_dist.prediction.records import plain
from mtl_dist.run_folder import RunFolder
from tests.ranks import RankPool
from tests.tiny_datasets import image_of, png
from tests.tiny_runs import rows, tensors_at, train_run
from tests.tiny_training import whole_up_to

pytest.importorskip("peft")
pytest.importorskip("timm")
pytestmark = pytest.mark.slow

NUM_STEPS = 2
SGD = ["optim.kind=sgd", "optim.lr=0.02"]  # Adam enlarges rounding where a gradient is nearly 0
COMMON = [
    "model.backbone=timm/test_vit",
    "model.timm.arguments={depth: 2}",
    f"train.max_steps={NUM_STEPS}",
    "train.checkpoint_every=1",
]
SHARED = [*COMMON, "model.adapter={rank: 2}"]
PER_TASK = [*COMMON, "model.adapter={rank: 2, per_task: true}", "tasks.value=null", "tasks.tags=null"]


@whole_up_to(0)
def train_divided(recipe: Path, run: Path, overrides: Sequence[str]) -> str:
    """Small weights are divided as well."""
    return train_run(recipe, run, overrides, dropout=False)


def learnt_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights and the optimizer's state: sums of training metrics are kept by rank."""
    return {name: t for name, t in tensors_at(run, step).items() if name.startswith(("model/", "optim"))}


@pytest.fixture(scope="module", params=[SHARED, PER_TASK], ids=["shared", "per task"])
def case(
    request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A run alone, and its overrides."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train_divided(recipe, run, [*request.param, *SGD]) == "done"
    return run, [*request.param, *SGD]


def test_resuming_equals_never_stopping_and_the_base_stays_as_it_was(
    case: tuple[Path, list[str]], recipe: Path, tmp_path: Path
) -> None:
    run, overrides = case
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{NUM_STEPS:08d}")
    assert train_divided(recipe, resumed, overrides) == "done"
    first, expected, found = tensors_at(run, 1), tensors_at(run, NUM_STEPS), tensors_at(resumed, NUM_STEPS)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    weights = [name for name in expected if name.startswith("model") and ".network." in name]
    base = [name for name in weights if not is_adapter(name)]
    assert base and all(torch.equal(first[name], expected[name]) for name in base)
    assert len(base) < len(weights)
    assert not all(torch.equal(first[name], expected[name]) for name in weights)
    states = [name for name in expected if name.startswith("optim") and ".network." in name]
    assert states and all(is_adapter(name) for name in states)


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_every_engine_trains_the_adapters_as_one_process_does(
    case: tuple[Path, list[str]], recipe: Path, ranks: RankPool, tmp_path: Path, engine: str
) -> None:
    alone, overrides = case
    divided = overrides if engine == "ddp" else [*overrides, f"engine.zero_stage={engine[-1]}"]
    assert ranks.run(train_divided, recipe, tmp_path / "run", divided) == ["done", "done"]
    found, expected = (learnt_at(run, NUM_STEPS) for run in (tmp_path / "run", alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.numel():
            scale = float(tensor.abs().max())
            assert float((found[name] - tensor).abs().max()) <= 2e-5 * scale + 2e-6, name
    for ours, theirs in zip(rows(tmp_path / "run", "step"), rows(alone, "step"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)


def test_an_export_holds_merged_weights_that_answer_alike_and_begin_a_plain_run(
    case: tuple[Path, list[str]], recipe: Path, tmp_path: Path
) -> None:
    run, overrides = case
    lines: list[str] = []
    out = export_run(run, "safetensors", out=tmp_path / "out", say=lines.append)
    assert out.difference <= 1e-5
    exported = mtl_dist.load(tmp_path / "out")
    assert not any(is_adapter(name) for name, _ in exported.module.named_parameters())
    merged = read_trained(RunFolder.open(run), lines.append).merged()
    assert merged.recipe.model.adapter is None
    plain = [each for each in overrides if "model.adapter" not in each]
    if "per_task" in str(overrides):
        plain.append("model.sharing=separate")
    begun = [*plain, f"start_from={run}", "optim.lr=1e-12", "train.max_steps=1"]
    assert train_run(recipe, tmp_path / "begun", begun) == "done"
    weights = tensors_at(tmp_path / "begun", 1)
    for name, tensor in merged.weights.items():
        if ".network." in name:
            torch.testing.assert_close(weights[f"model/{name}"], tensor, msg=name)


def test_the_run_its_exports_and_the_service_answer_alike(
    case: tuple[Path, list[str]], tmp_path: Path
) -> None:
    testing = pytest.importorskip("fastapi.testclient", reason="the extra serve is not installed")
    pytest.importorskip("python_multipart", reason="the extra serve is not installed")
    from mtl_dist.serving.app import build_app
    from mtl_dist.serving.limits import Limits

    run, _ = case
    images = [image_of(number) for number in range(3)]
    predictor = mtl_dist.load(run)
    expected = [plain(answer) for answer in predictor.predict_many(images, maps=False)]
    export_run(run, "safetensors", out=tmp_path / "out", say=lambda line: None)
    of_file = mtl_dist.load(tmp_path / "out").predict_many(images, maps=False)
    app = build_app(predictor, Limits(), "tiny", ("127.0.0.1",))
    with testing.TestClient(app, base_url="http://127.0.0.1") as client:
        files = [("files", (f"{number}.png", png(image))) for number, image in enumerate(images)]
        served = client.post("/predict", files=files).json()["predictions"]
        assert client.get("/model").json()["tasks"].keys() == predictor.tasks.keys()
    for answer, exported, found in zip(expected, of_file, served, strict=True):
        for task, values in answer.items():
            for key, value in values.items():
                near = pytest.approx(value, abs=1e-4) if isinstance(value, float | dict) else value
                assert plain(exported)[task][key] == near, (task, key)
                assert found["answers"][task][key] == near, (task, key)


def test_a_run_whose_extra_is_missing_says_what_to_install(
    case: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^model\.adapter: expected peft, .* Install it: pip [^.]*\.$"):
        mtl_dist.load(case[0])


def test_a_run_with_an_adapter_begins_with_the_weights_of_one_without(recipe: Path, tmp_path: Path) -> None:
    assert train_run(recipe, tmp_path / "plain", [*COMMON, "train.max_steps=1"]) == "done"
    begun = [*SHARED, f"start_from={tmp_path / 'plain'}", "train.max_steps=1", "optim.lr=1e-12"]
    assert train_run(recipe, tmp_path / "begun", begun) == "done"
    plain, found = tensors_at(tmp_path / "plain", 1), tensors_at(tmp_path / "begun", 1)
    name = "model/model.backbone.network.blocks.0.attn.qkv"
    assert torch.equal(plain[f"{name}.weight"], found[f"{name}.base_layer.weight"])
