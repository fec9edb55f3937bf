"""A run taken out in every form, and read back: it answers as the run does."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtl_dist
from mtl_dist.config import trust
from mtl_dist.errors import UserError
from mtl_dist.exporting import hub
from mtl_dist.exporting.description import Form
from mtl_dist.exporting.export import Exported, export_run
from mtl_dist.exporting.packages import Format
from mtl_dist.prediction.predictor import Predictor
from tests.tiny_datasets import image_of
from tests.tiny_runs import train_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    overrides = ["train.max_steps=2", "train.precision=fp32", "train.evaluate_at_end=true"]
    train_run(recipe, directory / "run", [*overrides, "tasks.tags.threshold=best_f1"])
    return directory / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> dict[str, Exported]:
    """The run in its forms; ONNX only where its packages are installed."""
    forms: list[Format] = ["torch", "safetensors"]
    try:
        import onnxruntime
        import onnxscript

        del onnxruntime, onnxscript
        forms.append("onnx")
    except ImportError:
        pass
    return {form: export_run(run, form) for form in forms}


@pytest.fixture(params=["onnx", "torch", "safetensors"])
def made(request: pytest.FixtureRequest, exported: dict[str, Exported]) -> Exported:
    if request.param not in exported:
        pytest.skip("the extra export is not installed")
    return exported[request.param]


def same(answer: Any, other: Any) -> None:
    """Equal, numbers to rounding, and masks but for a pixel at the edge of a threshold."""
    assert type(answer) is type(other)
    if isinstance(answer, dict):
        assert answer.keys() == other.keys()
        for key in answer:
            same(answer[key], other[key])
    elif isinstance(answer, np.ndarray):
        assert answer.shape == other.shape
        assert np.abs(answer.astype(float) - other).mean() < 1e-2
    elif isinstance(answer, float):
        assert answer == pytest.approx(other, abs=1e-4)
    else:
        assert answer == other


def test_what_is_read_back_answers_as_the_run(run: Path, made: Exported) -> None:
    ours, theirs = mtl_dist.load(run, "cpu"), mtl_dist.load(made.path, "cpu")
    assert made.difference <= 1e-4
    images = [image_of(number) for number in range(5)]
    for answer, other in zip(ours.predict_many(images), theirs.predict_many(images), strict=True):
        same(answer, other)
    same(ours.predict(image_of(1)), mtl_dist.load(made.file, "cpu").predict(image_of(1)))


def test_classes_normalisation_and_no_place_of_this_machine_are_in_it(made: Exported, run: Path) -> None:
    if made.file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(made.file)
        assert [output.name for output in session.get_outputs()] == ["digit", "value", "tags", "shape"]
        record = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    elif made.file.suffix == ".pt2":
        extra = {"mtl_dist.json": ""}
        torch.export.load(made.file, extra_files=extra)
        record = json.loads(extra["mtl_dist.json"])
    else:
        record = json.loads((made.path / "config.json").read_text())
    assert record["tasks"]["digit"]["classes"] == list(Predictor(run).tasks["digit"].info.classes)
    assert len(record["normalisation"]["mean"]) == record["images"]["channels"]
    assert str(run.parent.parent) not in json.dumps(record)


def test_the_card_holds_tasks_and_metrics_and_leaves_the_intended_use(exported: dict[str, Exported]) -> None:
    card = (exported["safetensors"].path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mtl_dist\n")
    assert "| digit | classification |" in card
    assert "On test:" in card
    assert "To be written by whoever publishes this model" in card


def test_an_archive_that_somebody_else_made_is_not_unpickled(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    shutil.copy(exported["torch"].file, tmp_path / "model.pt2")
    with pytest.raises(UserError, match="expected an archive of your own"):
        mtl_dist.load(tmp_path / "model.pt2")
    assert set(mtl_dist.load(tmp_path / "model.pt2", trust=True).tasks) == {"digit", "value", "tags", "shape"}


def test_what_cannot_be_read_back_is_a_line(made: Exported, tmp_path: Path) -> None:
    shutil.copytree(made.path, tmp_path / "cut")
    cut = tmp_path / "cut" / made.file.name
    cut.write_bytes(cut.read_bytes()[: made.num_bytes // 2])
    trust.mark(cut.parent, "config.json" if made.file.suffix == ".safetensors" else cut.name)
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        mtl_dist.load(cut, trust=True)


def test_an_export_that_cannot_be_is_a_line_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--images .*: expected an image"):
        export_run(run, "safetensors", tmp_path / "out", images=run / "log.txt")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="expected --format safetensors"):
        hub.check_push("me/model", "onnx")
    with pytest.raises(UserError, match="expected USER/NAME, found 'model'"):
        hub.check_push("model", "safetensors")


def test_a_hub_that_cannot_be_reached_is_a_line_and_the_model_stays(
    exported: dict[str, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise socket.gaierror("no such host")

    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("socket.getaddrinfo", offline)
    folder = exported["safetensors"].path
    with pytest.raises(UserError) as error:
        hub.push(folder, "me/model", public=False)
    assert str(error.value) == (
        f"--push-to me/model: expected the hub to take it, found: no such host. The model is in {folder}."
    )


def test_the_hub_is_given_card_description_and_weights(
    exported: dict[str, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repository: str, **given: Any) -> None:
            calls.append((repository, given))

        def upload_folder(self, **given: Any) -> None:
            calls.append((given["repo_id"], given))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = exported["safetensors"].path
    assert hub.push(folder, "me/model", public=False) == "https://huggingface.co/me/model"
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert {path.name for path in folder.iterdir()} >= set(calls[1][1]["allow_patterns"])


@pytest.mark.exhaustive
def test_a_graph_that_resizes_takes_images_of_any_size(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    made = export_run(run, "onnx", tmp_path / "inside", form=Form(resize_inside=True))
    assert made.difference <= 1e-4


def test_an_export_replaces_nothing_but_an_earlier_one_and_keeps_an_edited_card(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("my own")
    for other in (mine, run):
        with pytest.raises(UserError, match="expected a new or empty folder, or one of an earlier export"):
            export_run(run, "safetensors", other)
    assert (mine / "README.md").read_text() == "my own"
    made = export_run(run, "safetensors", tmp_path / "out").path
    (made / "README.md").write_text("edited")
    export_run(run, "safetensors", made)
    assert (made / "README.1.md").read_text() == "edited"
    assert "kept as README.1.md" in capsys.readouterr().out
    export_run(run, "safetensors", made)
    assert not (made / "README.2.md").exists()


def test_a_model_of_one_size_is_named_where_any_size_is_asked(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--any-size: .*model\.backbone.*--resize-inside") as refused:
        export_run(run, "torch", tmp_path / "out", form=Form(any_size=True))
    assert "\n" not in str(refused.value)
