"""The examples of docs/extend.md, run as they stand there."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import mtl_dist
from mtl_dist.checkpoint import read_checkpoint
from mtl_dist.cli import app
from mtl_dist.config.loading import to_yaml
from mtl_dist.config.yaml_text import dump, parse
from mtl_dist.data.contact_sheet import contact_sheet
from mtl_dist.data.manifest import read_manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.packing import pack
from mtl_dist.kinds.cells import Parsed, parse_cells
from mtl_dist.kinds.registry import scalar_kind
from mtl_dist.kinds.vocabulary import Declared
from mtl_dist.launch.snapshot import take_snapshot
from mtl_dist.recipe import Recipe, load_recipe
from tests.ranks import RankPool

pytestmark = pytest.mark.slow

ROOT = Path(mtl_dist.__file__).parents[1]
PAGE = ROOT / "docs" / "extend.md"
SIZE = 16
BASE = {
    "tasks": {"digit": {"kind": "classification"}, "ink": {"kind": "segmentation"}},
    "data": {"train": [{"path": "data/scans"}], "image_size": SIZE, "augment": "none", "workers": 0},
    "train": {"epochs": 2, "global_batch": 8, "log_every": 1},
}


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def fragments() -> list[dict[str, Any]]:
    """The pieces of a recipe that the page shows, besides its beginning and what stands alone."""
    alone = [network(), dataset(), joint()]
    return [piece for piece in map(first_of, blocks("yaml")[1:]) if piece not in alone]


def first_of(text: str) -> dict[str, Any]:
    piece: dict[str, Any] = parse(text)[0]
    return piece


def network() -> dict[str, Any]:
    """The piece with a whole model, which has no room for a backbone and heads."""
    return next(first_of(text) for text in blocks("yaml") if "network:" in text)


def dataset() -> dict[str, Any]:
    """The piece with a Dataset in place of prepared data."""
    return next(first_of(text) for text in blocks("yaml") if "dataset:" in text)


def joint() -> dict[str, Any]:
    """The piece with a joint loss, which ZeRO 3 does not take."""
    return next(first_of(text) for text in blocks("yaml") if "joint_losses:" in text)


def scan(number: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[2 : 4 + number % 10, 3:9] = 1
    return mask * 200 + 20, mask


def png(picture: np.ndarray, path: Path) -> bytes:
    Image.fromarray(picture).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the page's modules, a dataset, and one recipe that uses all of them."""
    directory = tmp_path_factory.mktemp("project")
    for text in blocks("python"):
        name = re.match(r"# (\S+\.py)\n", text)
        assert name is not None
        path = directory / name[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (directory / "scans").mkdir()
    before = os.getcwd()
    os.chdir(directory)
    records: dict[str, list[Record]] = {"train": [], "val": []}
    for number in range(40):
        picture, mask = scan(number)
        image = png(picture, directory / "scans" / f"{number}_{number % 10}.png")
        key, split = f"scan{number}", "val" if number % 4 == 0 else "train"
        masks = {"ink": png(mask, directory / "mask.png")}
        records[split].append(Record(key, image, {"digit": number % 10, "cells": number % 7}, masks))
    tasks = {
        "digit": TaskSource("classification", tuple("0123456789")),
        "ink": TaskSource("segmentation", ("background", "ink")),
        "cells": TaskSource("my_project.count.Count", unit="cells"),
    }
    pack(records, directory / "data" / "scans", tasks, "scans", options=PackOptions(workers=1))
    recipe = OmegaConf.merge(OmegaConf.create(BASE), *map(OmegaConf.create, fragments()))
    (directory / "recipe.yaml").write_text(dump(OmegaConf.to_container(recipe)))
    yield directory
    os.chdir(before)
    forget(directory)


def forget(project: Path) -> None:
    """Undo what importing from a project leaves."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]
    sys.path.remove(str(project))


@pytest.fixture(scope="module")
def recipe(project: Path) -> Recipe:
    return load_recipe(project / "recipe.yaml")


@pytest.fixture(scope="module")
def run(project: Path, recipe: Recipe) -> Path:
    from mtl_dist.runs.train import train

    train(recipe, project / "run")
    return project / "run"


def test_every_example_is_at_most_20_lines_and_a_whole_kind_of_task_at_most_60() -> None:
    assert len(blocks("python")) == 18
    for text in blocks("python"):
        lines = [line for line in text.splitlines()[1:] if line.strip()]
        most = 60 if "CommonTaskSettings" in text else 20
        assert len(lines) <= most, f"{text.splitlines()[0]}: {len(lines)} lines"


def test_a_kind_of_ones_own_checks_counts_and_shows_its_labels(project: Path) -> None:
    info = read_manifest(project / "data" / "scans").tasks["cells"]
    assert (info.kind, info.unit, info.minimum, info.maximum) == ("my_project.count.Count", "cells", 0.0, 6.0)
    kind = scalar_kind(info.kind)
    declared = Declared()
    assert parse_cells(kind, ["3", "", "0"], str, declared) == Parsed((), [3, None, 0])
    for wrong in ("-1", "2.5", "many"):
        with pytest.raises(UserError, match=f"expected a whole number >= 0 or nothing, found '{wrong}'"):
            parse_cells(kind, [wrong], str, declared)
    contact_sheet(project / "data" / "scans", "train", project / "sheet.png")
    assert kind.text(3.0, info) == "3 cells"


def test_a_kind_of_ones_own_is_judged_by_its_metrics_and_predicted(project: Path, run: Path) -> None:
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())["val"]["cells"]
    assert set(metrics) == {"loss", "mae", "exact", "num_samples"} and metrics["num_samples"] == 10
    assert mtl_dist.load(run).predict(project / "scans" / "3_3.png")["cells"]["count"] > 0


def test_cutmix_of_a_kind_that_has_none_is_refused_with_its_reason(project: Path) -> None:
    from mtl_dist.runs.train import train

    with pytest.raises(UserError, match="found cells: a part of an image does not say how many are in it"):
        train(load_recipe(project / "recipe.yaml", ["data.blend={cutmix: 1.0}"]), project / "blended")


def test_a_recipe_of_own_parts_states_all_their_arguments_and_reads_back_equal(
    recipe: Recipe, tmp_path: Path
) -> None:
    text = to_yaml(recipe)
    assert "beta: 0.7" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml").model_dump() == recipe.model_dump()


def test_every_own_part_is_used(recipe: Recipe, run: Path) -> None:
    from mtl_dist.assemble import build_root
    from mtl_dist.engine.accelerated import connect_accelerate
    from mtl_dist.run_folder import RunFolder

    root = build_root(recipe, RunFolder.open(run).read_data(), connect_accelerate()[1])
    assert type(root.tasks["ink"].loss).__name__ == "Tversky"
    assert root.tasks["ink"].loss.alpha == 0.4  # type: ignore[attr-defined]
    assert type(root.balancer.method).__name__ == "InverseNorm"
    assert type(root.model.heads["digit"].module).__name__ == "Gated"  # type: ignore[union-attr]
    assert type(root.model).__name__ == "Weighed"
    trained = read_checkpoint(sorted((run / "checkpoints").glob("step_*"))[-1]).tensors["model"]
    gains = [float(tensor) for name, tensor in trained.items() if name.startswith("model.gains.")]
    assert len(gains) == 6 and all(gain != 0.5 for gain in gains)
    assert len(root.model.task_parameters("digit")) == 1 + len(list(root.model.heads["digit"].parameters()))
    assert root.model.shared_parameters()[0].shape == (8, 1, 3, 3)
    assert [type(step).__name__ for step in recipe.data.user_transforms(training=True)] == [
        "Fog",
        "LibraryTransform",
    ]
    assert [type(step).__name__ for step in recipe.data.batch_transforms] == ["SameLight"]
    assert recipe.data.user_transforms(training=False) == ()
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())["val"]["digit"]
    assert 0 <= metrics["top3"] <= 1
    assert -1 <= metrics["kappa"] <= 1
    assert metrics["accuracy"] <= metrics["top3"]


def test_an_optimizer_and_a_schedule_of_ones_own_train_and_are_kept(recipe: Recipe, run: Path) -> None:
    assert recipe.optim.kind == "my_project.optimizers.Smoothed"
    checkpoint = read_checkpoint(sorted((run / "checkpoints").glob("step_*"))[-1])
    assert {name.split("/")[0] for name in checkpoint.tensors["optimizer"]} == {"average"}
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = [row["lr/backbone"] for row in rows if row["kind"] == "step"]
    assert rates[:8] == pytest.approx([0.1 * (1 - 0.9 * step / 8) for step in range(8)])


def test_a_whole_model_of_ones_own_is_balanced_resumed_and_predicts(project: Path) -> None:
    from mtl_dist.runs.train import train

    stated = {**BASE, **network(), "balance": {"method": "cagrad", "level": "parameters"}}
    stated["train"] = {**BASE["train"], "epochs": 1}
    train(load_recipe(stated), project / "whole")
    outcome = train(load_recipe(project / "whole" / "recipe.yaml", ["train.epochs=2"]), project / "whole")
    assert (outcome.state, outcome.step) == ("done", 8)
    train(load_recipe({**stated, "train": BASE["train"]}), project / "at-once")
    assert logged_losses(project / "whole")[:4] == logged_losses(project / "at-once")[:4]
    answer = mtl_dist.load(project / "whole").predict(project / "scans" / "3_3.png")
    assert answer["ink"]["mask"].shape == (SIZE, SIZE)


def test_a_joint_loss_of_ones_own_is_balanced_resumed_and_recorded(project: Path) -> None:
    from mtl_dist.runs.train import train

    stated = {**BASE, **joint(), "balance": {"method": "cagrad"}, "train": {**BASE["train"], "epochs": 1}}
    run = project / "joint"
    train(load_recipe(stated), run)
    assert train(load_recipe(run / "recipe.yaml", ["train.epochs=2"]), run).state == "done"
    history = json.loads((run / "history.json").read_text())
    assert len(history["val"]["amount/loss"]) == len(history["train"]["amount/loss"]) == 2
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert any("balance/weight/amount" in row for row in rows)
    with pytest.raises(UserError, match=r"joint_losses\.amount\.weight: expected 1 under"):
        train(load_recipe(stated, ["joint_losses.amount.weight=2"]), project / "weighted")


def test_a_dataset_of_ones_own_trains_is_resumed_and_evaluated(project: Path) -> None:
    from mtl_dist.runs.evaluation import evaluate_run
    from mtl_dist.runs.train import train

    stated = {**BASE, "data": {**BASE["data"], **dataset()["data"]}, "train": {**BASE["train"], "epochs": 1}}
    del stated["tasks"]
    train(load_recipe(stated), project / "apart")
    run = load_recipe(project / "apart" / "recipe.yaml", ["train.epochs=2"])
    assert {name: task.kind for name, task in run.tasks.items()} == {
        "digit": "classification",
        "ink": "segmentation",
    }
    outcome = train(run, project / "apart")
    assert (outcome.state, outcome.step) == ("done", 8)
    evaluate_run(project / "apart", "val")
    metrics = json.loads((project / "apart" / "evaluation" / "metrics.json").read_text())["val"]
    assert (metrics["digit"]["num_samples"], metrics["ink"]["num_samples"]) == (9, 10)


def test_a_tracker_of_ones_own_has_every_epoch(run: Path) -> None:
    lines = (run / "epochs.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines] == [4, 8]


def test_a_callback_of_ones_own_is_called_after_evaluations_and_at_the_end(run: Path) -> None:
    scores = [line.partition(":")[0] for line in (run / "scores.txt").read_text().splitlines()]
    assert scores[:3] == ["4 of 8", "8 of 8", "the best"]


def test_the_monitored_metric_may_be_an_own_one(recipe: Recipe, run: Path) -> None:
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    history = json.loads((run / "history.json").read_text())["val"]["digit/top3"]
    assert recipe.monitor_mode == "max"
    assert max(history) in best.values()


def test_a_run_with_own_parts_is_resumed_evaluated_and_predicted_with(project: Path, run: Path) -> None:
    from mtl_dist.runs.evaluation import evaluate_run
    from mtl_dist.runs.train import train

    outcome = train(load_recipe(run / "recipe.yaml", ["train.epochs=3"]), run)
    assert (outcome.state, outcome.step) == ("done", 12)
    evaluate_run(run, "val")
    answer = mtl_dist.load(run).predict(project / "scans" / "3_3.png")
    assert answer["ink"]["mask"].shape == (SIZE, SIZE)
    assert answer["digit"]["class_name"] in "0123456789"


def logged_losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        row[key]
        for row in rows
        for key in row
        if key.startswith(("step/", "train/")) and key.endswith("loss")
    ]


@pytest.fixture(scope="module")
def mix(project: Path) -> list[str]:
    """The recipe's data, and beside it what the page's importer prepares: it knows one task of the two."""
    importer, *settings = blocks("sh")[0].split()[2:]
    prepare = ["prepare", importer, "data/mixed", *settings[1:]]
    with pytest.raises(SystemExit) as ended:
        app(prepare, prog_name="mtl")
    assert ended.value.code == 0
    return ["data.train=[{path: data/scans}, {path: data/mixed}]", "train.epochs=1"]


@pytest.fixture(scope="module")
def one_process(project: Path, mix: list[str]) -> list[float]:
    from mtl_dist.runs.train import train

    # Cut as two ranks cut it: batch normalization sees micro-batches.
    train(load_recipe(project / "recipe.yaml", [*mix, "train.accumulation=2"]), project / "one")
    return logged_losses(project / "one")


def assert_learnt_alike(run: Path, one_process: list[float], engine: str) -> None:
    said = (run / "log.txt").read_text()
    assert engine in said
    assert "warning  the same image in train of mixed and val of scans: " in said
    assert logged_losses(run) == pytest.approx(one_process, rel=1e-4)
    assert (run / "scores.txt").read_text().count("\n") == 2
    answer = mtl_dist.load(run).predict(run.parent / "scans" / "3_3.png")
    assert answer["ink"]["mask"].shape == (SIZE, SIZE)


@pytest.mark.timeout(660)
def test_two_launched_ranks_with_all_own_parts_learn_what_one_process_learns(
    project: Path, mix: list[str], one_process: list[float]
) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mtl_dist", "launch", "recipe.yaml", *mix, "engine.kind=accelerate"]
    command += ["--nproc", "2", "--run-dir", "ddp"]
    done = subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_learnt_alike(project / "ddp", one_process, "DDP on 2 ranks")


def train_in(project: Path, run: str, overrides: list[str]) -> None:
    """On every rank; nothing of the project stays in its process."""
    from mtl_dist.runs.train import train

    before = os.getcwd()
    os.chdir(project)
    try:
        train(load_recipe(project / "recipe.yaml", overrides), project / run)
    finally:
        os.chdir(before)
        forget(project)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_deepspeed_with_all_own_parts_learn_what_one_process_learns(
    project: Path, mix: list[str], one_process: list[float], ranks: RankPool, stage: int
) -> None:
    engine = ["engine.kind=deepspeed", f"engine.zero_stage={stage}"]
    ranks.run(train_in, project, f"zero{stage}", [*mix, *engine])
    assert_learnt_alike(project / f"zero{stage}", one_process, f"DeepSpeed ZeRO {stage} on 2 ranks")


def test_the_snapshot_for_a_cluster_takes_the_modules_along(recipe: Recipe, tmp_path: Path) -> None:
    taken = take_snapshot(tmp_path / "code")
    assert "my_project" in taken
    assert (tmp_path / "code" / "my_project" / "losses.py").is_file()


def test_the_importer_prepares_a_dataset(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = blocks("sh")[0].split()
    assert command[0] == "mtl"
    with pytest.raises(SystemExit) as ended:
        app(command[1:], prog_name="mtl")
    assert ended.value.code == 0
    assert "32 train, 8 test" in capsys.readouterr().out
    manifest = json.loads((project / "data" / "named" / "dataset.json").read_text())
    assert manifest["tasks"]["digit"]["kind"] == "classification"


def test_the_loss_of_the_page_is_a_mean_over_labelled_samples(project: Path) -> None:
    tversky = importlib.import_module("my_project.losses").Tversky()
    target = torch.tensor(np.stack([scan(3)[1], np.full((SIZE, SIZE), 255, np.uint8)]))
    assert tversky.denominators(target).tolist() == [1.0, 0.0]
    perfect = torch.where(target == 1, 50.0, -50.0)[:, None]
    assert tversky.numerators(perfect, target)[0].item() == pytest.approx(0.0, abs=1e-6)
