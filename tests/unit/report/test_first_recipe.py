"""`mtl init DATASET`: a recipe for a dataset, every choice with its reason."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mtl_dist.cli import main
from mtl_dist.data.inspect import inspect_dataset
from mtl_dist.errors import UserError
from mtl_dist.recipe import load_recipe
from mtl_dist.report.first_recipe import Device, first_recipe
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.registry import TASKS
from tests.tiny_datasets import TASKS as TASKS_OF_IT
from tests.tiny_datasets import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "tiny data"
    several = replace(TASKS_OF_IT["value"], maximum=4.0)  # which its writer does not count
    write_dataset(directory, {"train": 16, "val": 4}, tasks=TASKS_OF_IT | {"value": several})
    return directory


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_it_is_a_recipe_that_learns_every_task_of_the_dataset(dataset: Path, device: Device) -> None:
    inspection = inspect_dataset(dataset)
    text = first_recipe(inspection, device)
    recipe = load_recipe(yaml.safe_load(text))
    assert {name: task.kind for name, task in recipe.tasks.items()} == {
        name: info.kind for name, info in inspection.manifest.tasks.items()
    }
    assert (recipe.train.precision == "bf16") == (device == "gpu")
    assert recipe.data.train[0].path == dataset
    for setting in ("image_size", "augment", "backbone", "global_batch", "epochs"):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{setting}:")]
        assert "  # " in line, line


def test_tasks_of_which_nothing_can_be_learnt_are_left_out_with_the_reason(dataset: Path) -> None:
    inspection = inspect_dataset(dataset)
    some = next(iter(inspection.manifest.splits["train"].labels.values()))
    added = {
        "alone": TaskInfo("classification", ("only",), 16, (16,)),
        "one left": TaskInfo("ordinal", ("low", "high"), 1, (0, 1)),
        "constant": TaskInfo("regression", (), 16, mean=7.5, minimum=7.5, maximum=7.5),
        "nowhere": TaskInfo("regression"),
    }
    splits = {
        name: replace(split, labels=split.labels | dict.fromkeys(added, some))
        for name, split in inspection.manifest.splits.items()
    }
    manifest = replace(inspection.manifest, tasks=inspection.manifest.tasks | added, splits=splits)
    text = first_recipe(replace(inspection, manifest=manifest), "cpu")
    assert yaml.safe_load(text)["tasks"].keys() == inspection.manifest.tasks.keys()
    for line in (
        "  # alone is left out: every label is only",
        "  # one left is left out: every label is high",
        "  # constant is left out: every label is 7.5",
        "  # nowhere is left out: it has no label to train on",
    ):
        assert line in text.splitlines()
    only = replace(manifest, tasks={name: added[name] for name in ("alone", "constant")})
    with pytest.raises(UserError, match=r"found alone: every label is only; constant: every label is 7\.5"):
        first_recipe(replace(inspection, manifest=only), "cpu")


def test_a_dataset_without_val_is_told_what_is_missing(dataset: Path) -> None:
    inspection = inspect_dataset(dataset)
    manifest = inspection.manifest
    alone = replace(manifest, splits={"fit": manifest.splits["train"]})
    text = first_recipe(replace(inspection, manifest=alone), "cpu")
    assert "--val 0.2" in text
    assert yaml.safe_load(text)["data"]["train"][0]["split"] == "fit"
    assert "--val 0.2" not in first_recipe(inspection, "cpu")


@pytest.mark.parametrize(
    ("kind", "unit", "zooms"),
    [
        ("regression", "px", False),
        ("regression", "pixels", False),
        ("regression", "px²", False),
        ("vector", "mm,px", False),
        ("regression", "mm", True),
        ("regression", "megapixels", True),
        ("depth", "px", True),
    ],
)
def test_no_crops_are_proposed_where_a_label_is_a_length_in_pixels(
    dataset: Path, kind: str, unit: str, zooms: bool
) -> None:
    inspection = inspect_dataset(dataset)
    classes, counts = (("a", "b"), (9, 9)) if kind == "vector" else ((), ())
    info = TaskInfo(kind, classes, 9, counts, unit=unit)
    splits = {
        name: replace(split, labels=split.labels | {"width": next(iter(split.labels.values()))})
        for name, split in inspection.manifest.splits.items()
    }
    tasks = inspection.manifest.tasks | {"width": info}
    manifest = replace(inspection.manifest, tasks=tasks, splits=splits, channels=3)
    text = first_recipe(replace(inspection, manifest=manifest), "cpu")
    (line,) = [line for line in text.splitlines() if line.strip().startswith("augment:")]
    augmentation = load_recipe(yaml.safe_load(text)).data.augmentation
    assert (augmentation.crop_scale != (1.0, 1.0)) == zooms
    assert augmentation.zoom == (1.0, 1.0)
    assert (
        "or a label is a size" in line
        if zooms
        else "no crops and no zoom, which would change width in pixels" in line
    )


def test_the_size_of_pictures_is_told_as_a_typical_one(dataset: Path) -> None:
    text = first_recipe(
        replace(inspect_dataset(dataset), image_sizes={"train": [(90, 60), (60, 80), (20, 30)]}), "gpu"
    )
    assert "image_size: 64  # the shorter side of pictures is typically 60 pixels; a multiple of 32" in text


def test_few_samples_of_val_are_told_with_what_that_means(dataset: Path) -> None:
    inspection = inspect_dataset(dataset)
    manifest = inspection.manifest

    def text(num_val: int) -> str:
        val = replace(manifest.splits["val"], num_samples=num_val)
        splits = manifest.splits | {"val": val}
        return first_recipe(replace(inspection, manifest=replace(manifest, splits=splits)), "cpu")

    assert "val has 47 samples: what is measured on them is uncertain, an accuracy by up to 0.14" in text(47)
    assert "uncertain" not in text(200)


def test_labels_choose_the_loss() -> None:
    def loss(info: TaskInfo) -> object:
        return TASKS[info.kind].suited_to(info)[0].get("loss")

    rare = TaskInfo("classification", ("a", "b"), 100, (90, 10))
    assert loss(rare) == {"kind": "cross_entropy", "class_weights": "balanced"}
    assert loss(replace(rare, class_counts=(60, 40))) is None
    assert loss(replace(rare, class_counts=(100, 0))) is None  # nothing can be balanced
    mask = TaskInfo("segmentation", ("background", "m"), 9, (900, 100))
    assert loss(mask) == {"kind": "bce_dice"}
    assert loss(replace(mask, class_counts=())) is None
    number = TaskInfo("regression", num_labelled=9, mean=1.0, std=1.0, minimum=0.0, maximum=9.0)
    assert loss(number) == {"kind": "smooth_l1"}
    assert loss(replace(number, maximum=3.0)) is None


def test_the_command_prints_it_or_writes_a_new_file(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mtl", "init", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert init(str(dataset)) == 0
    shown = capsys.readouterr().out
    assert init(str(dataset), str(tmp_path)) == 0
    assert (tmp_path / "tiny data.yaml").read_text() == shown
    assert init(str(dataset), str(tmp_path)) == 2
    assert "expected a new file, found one" in capsys.readouterr().err
    assert init(str(dataset), str(dataset)) == 2
    assert "found the dataset" in capsys.readouterr().err
    table = tmp_path / "labels.csv"
    table.touch()
    for place, says in (
        (table, f"found the file {table}. Prepare it first: mtl prepare table {table} data/NAME"),
        (tmp_path, f"found the folder {tmp_path}, which is none. Prepare it first: mtl prepare auto"),
        (tmp_path / "nosuch", f"found no folder {tmp_path / 'nosuch'}."),
    ):
        assert init(str(place)) == 2
        assert says in capsys.readouterr().err
    assert init("digts") == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_by_it_trains(dataset: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(first_recipe(inspect_dataset(dataset), "cpu"), encoding="utf-8")
    command = [sys.executable, "-m", "mtl_dist", "train", str(recipe), "train.max_steps=2", "data.workers=0"]
    subprocess.run([*command, "--run-dir", str(tmp_path / "run")], check=True, capture_output=True)
    assert (tmp_path / "run" / "history.json").is_file()
