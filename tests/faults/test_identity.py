"""The data has an identity: a run goes on with, and is measured on, the data that it was trained with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.assemble import identified
from mtl_dist.checkpoint import read_checkpoint, step_directory
from mtl_dist.data.content_hashes import HASH_DTYPE
from mtl_dist.data.facts import DataFacts, data_differences
from mtl_dist.data.loader import open_data
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.prediction.predictor import Predictor
from mtl_dist.runs.evaluation import evaluate_run
from tests.tiny_datasets import TASKS, image_of, write_dataset
from tests.tiny_runs import rows, train_run, write_recipe


def facts_in(directory: Path) -> DataFacts:
    settings = DataSettings(train=({"path": str(directory)},), image_size=8)
    return identified(open_data(settings, list(TASKS)))


def change(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the manifest as somebody might who rewrites a dataset in its place."""
    path = directory / "dataset.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def swapped(manifest: dict[str, Any]) -> None:
    classes = manifest["tasks"]["digit"]["classes"]
    classes[0], classes[1] = classes[1], classes[0]


def renamed(manifest: dict[str, Any]) -> None:
    manifest["tasks"]["digit"]["classes"][1] = "z"


def added(manifest: dict[str, Any]) -> None:
    manifest["tasks"]["digit"]["classes"].append("d")


def another_mean(manifest: dict[str, Any]) -> None:
    manifest["tasks"]["value"]["mean"] += 0.5


def another_hash(manifest: dict[str, Any]) -> None:
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64


EDITS = {
    swapped: "task digit: expected the class 0 to be a, found b: its classes are in another order",
    renamed: "task digit: expected the classes a, b, c, found others: b is called z",
    added: "task digit: expected 3 classes, found 4: d was added",
    another_mean: "task value: expected labels with the mean 0, found 0.5",
    another_hash: "data.train, train of tiny: expected the same shards, found others",
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "tiny", {"train": 12, "val": 4, "test": 3})


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_what_a_dataset_means_or_holds_otherwise_is_named(
    tiny: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    before = facts_in(tiny)
    change(tiny, edit)
    assert EDITS[edit] in data_differences(before, facts_in(tiny))[0]


def test_fewer_samples_are_named(tiny: Path, tmp_path: Path) -> None:
    before = facts_in(tiny)
    shutil.rmtree(tiny)
    write_dataset(tiny, {"train": 10, "val": 4})
    assert "data.train, train of tiny: expected 12 samples, found 10." in data_differences(
        before, facts_in(tiny)
    )


def test_the_facts_survive_their_json_and_a_move_of_the_data(tiny: Path, tmp_path: Path) -> None:
    before = facts_in(tiny)
    assert data_differences(DataFacts.parse(before.to_json()), before) == []
    tiny.rename(tmp_path / "elsewhere")
    assert data_differences(before, facts_in(tmp_path / "elsewhere")) == []


@pytest.mark.parametrize(
    ("order", "words"), [("turned", "found another order"), ("others", "found others of the same number")]
)
def test_other_images_of_the_same_number_and_another_order_are_told_apart(
    tiny: Path, order: str, words: str
) -> None:
    change(tiny, lambda manifest: manifest.update(content_hashes="hashes"))
    for split, number in (("train", 12), ("val", 4), ("test", 3)):
        np.save(tiny / f"{split}.hashes.npy", np.arange(number).astype(HASH_DTYPE))
    before = facts_in(tiny)
    hashes = np.arange(12)[::-1] if order == "turned" else np.arange(12) + 5
    np.save(tiny / "train.hashes.npy", hashes.astype(HASH_DTYPE))
    assert words in data_differences(before, facts_in(tiny))[0]


# ---------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset `tiny`, its recipe and a run of two steps; to be copied by `work`."""
    folder = tmp_path_factory.mktemp("identity")
    write_dataset(folder / "tiny", {"train": 12, "val": 4, "test": 3})
    recipe = write_recipe(folder, Path("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_run(recipe, folder / "run", ["train.epochs=1", "train.log_every=1"])
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in its place: the run knows the data by its absolute path."""
    kept = tmp_path / "kept"
    shutil.copytree(trained, kept)
    monkeypatch.chdir(trained)
    yield trained  # type: ignore[misc]
    shutil.rmtree(trained)
    shutil.copytree(kept, trained)


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REFUSED: dict[str, tuple[list[str], Callable[[Path], None]]] = {
    "another seed": (["train.seed=7"], lambda work: None),
    "another place": (["data.train.0.path=other"], lambda work: shutil.copytree("tiny", "other")),
    "classes swapped": ([], lambda work: change(work / "tiny", swapped)),
    "another mean": ([], lambda work: change(work / "tiny", another_mean)),
    "a damaged checkpoint": ([], lambda work: damage(work)),
    "another size of images": (["data.image_size=12"], lambda work: None),
    "another global batch": (["train.global_batch=4", "optim.lr=1e-5"], lambda work: None),
}


def damage(work: Path) -> None:
    for path in (work / "run" / "checkpoints").glob("step_*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_resume_leaves_every_byte_as_it_was_and_lets_go_of_the_folder(
    work: Path, name: str
) -> None:
    overrides, prepare = REFUSED[name]
    prepare(work)
    (work / "run" / ".lock").unlink()
    before = bytes_of(work / "run")
    for _ in range(2):  # the second start is refused for the same reason, not for a lock of the first
        with pytest.raises(UserError) as refusal:
            train_run(work / "recipe.yaml", work / "run", ["train.epochs=2", *overrides])
        assert "another process" not in str(refusal.value)
    assert bytes_of(work / "run") == before


def test_a_size_of_images_that_the_weights_do_not_fit_is_named_as_the_cause(work: Path) -> None:
    with pytest.raises(UserError) as refusal:
        train_run(work / "recipe.yaml", work / "run", ["train.epochs=2", "data.image_size=12"])
    (line,) = str(refusal.value).splitlines()
    assert line.startswith("data.image_size: 8 in the run, 12 now, where model.backbone.")
    assert "code" not in line and line.endswith("set it back, or choose another --run-dir.")


def test_the_refusal_says_how_to_begin_with_the_weights_and_that_works(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(work / "tiny", added)
    change(work / "tiny", lambda m: m["tasks"]["digit"]["class_counts"].append(0))
    with pytest.raises(UserError, match=f"--from {work / 'run'}, without --run-dir"):
        train_run(work / "recipe.yaml", work / "run", ["train.epochs=2"])
    train_run(work / "recipe.yaml", work / "new", ["train.max_steps=1", "optim.lr=1e-12", "start_from=run"])
    assert "untrained: heads.digit" in capsys.readouterr().err
    old, new = (
        read_checkpoint(step_directory(work / name / "checkpoints", step)).tensors["model"]
        for name, step in (("run", 2), ("new", 1))
    )
    kept = {
        name
        for name in old
        if old[name].shape == new[name].shape and torch.allclose(old[name], new[name], atol=1e-6)
    }
    assert {name for name in old if name.startswith("model.backbone.")} <= kept
    assert {name.split(".")[2] for name in old.keys() - kept if name.startswith("model.")} == {"digit"}


@pytest.mark.parametrize("edit", [swapped, renamed])
def test_weights_that_begin_a_run_on_other_classes_of_the_same_number_are_said_to(
    work: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], None]
) -> None:
    change(work / "tiny", edit)
    train_run(work / "recipe.yaml", work / "new", ["train.max_steps=1", "start_from=run"])
    said = " ".join(capsys.readouterr().err.split())
    assert f"{EDITS[edit]}. Its head begins with the old weights, class by class in their order." in said
    assert "value" not in said.partition("begins with the weights of")[2]


def test_data_that_has_moved_is_said_to_have_and_is_checked(work: Path) -> None:
    (work / "tiny").rename(work / "moved")
    moved = ["train.epochs=2", "data.train.0.path=moved"]
    with pytest.raises(UserError, match=r"data.train.0.path: expected .*tiny.* found .*moved.*--data-moved"):
        train_run(work / "recipe.yaml", work / "run", moved)
    assert train_run(work / "recipe.yaml", work / "run", moved, data_moved=True) == "done"
    change(work / "moved", renamed)
    with pytest.raises(UserError, match="b is called z"):
        train_run(work / "recipe.yaml", work / "run", ["train.epochs=3", moved[1]], data_moved=True)


def test_a_run_answers_with_its_own_classes_whatever_the_dataset_says_today(work: Path) -> None:
    change(work / "tiny", renamed)
    data = json.loads((work / "run" / "data.json").read_text())
    data["task_infos"]["digit"]["classes"] = ["x", "y", "z"]
    (work / "run" / "data.json").write_text(json.dumps(data))
    answer = Predictor(work / "run").predict(image_of(3))
    assert set(answer["digit"]["probabilities"]) == {"a", "b", "c"}


def test_another_dataset_is_measured_by_name_and_never_in_the_place_of_the_run_s(work: Path) -> None:
    write_dataset(work / "more", {"test": 5, "train": 2}, first=50)
    evaluate_run(work / "run", "test", Path("more"))
    evaluate_run(work / "run", "test")
    (work / "tiny").rename(work / "moved")
    evaluate_run(work / "run", "val", Path("moved"))
    assert set(json.loads((work / "run/evaluation/metrics.json").read_text())) == {"more-test", "test", "val"}
    change(work / "more", swapped)
    with pytest.raises(UserError, match="the class 0 to be a, found b"):
        evaluate_run(work / "run", "test", Path("more"))


def test_a_split_that_has_changed_is_not_measured_as_the_run_s(work: Path) -> None:
    shutil.rmtree("tiny")
    write_dataset(work / "tiny", {"train": 12, "val": 4, "test": 2})
    before = bytes_of(work / "run")
    with pytest.raises(UserError, match=r"data.test, test of tiny: expected 3 samples, found 2") as refusal:
        evaluate_run(work / "run", "test")
    assert f"mtl evaluate {work / 'run'} --split test --data DATASET" in str(refusal.value)
    assert bytes_of(work / "run") == before
    evaluate_run(work / "run", "val")


def test_another_val_set_or_metric_restarts_the_best_and_says_so(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("tiny")
    write_dataset(work / "tiny", {"train": 12, "val": 3, "test": 3})
    train_run(work / "recipe.yaml", work / "run", ["train.epochs=2", "optim.lr=1e-9"])
    said = capsys.readouterr().out
    assert "changed  data.val, val of tiny: expected 4 samples, found 3; the best evaluation restarts" in said
    assert "changed  optim.lr: 0.003 before, 1e-09 from here on" in said
    state = read_checkpoint(step_directory(work / "run" / "checkpoints", 4)).state
    assert state["best"]["step"] == 4
    train_run(work / "recipe.yaml", work / "run", ["train.epochs=3", "monitor.metric=val/digit/accuracy"])
    assert "changed  monitor.metric: " in capsys.readouterr().out
    best = json.loads((work / "run/checkpoints/best.json").read_text())
    assert (best["metric"], best["step"]) == ("val/digit/accuracy", len(rows(work / "run", "step")))
