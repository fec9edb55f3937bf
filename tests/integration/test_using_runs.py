"""What a finished run leaves behind, and what can be done with it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import mtl_dist
from mtl_dist.config.loading import to_yaml
from mtl_dist.debug import overfit
from mtl_dist.errors import UserError
from mtl_dist.recipe import load_recipe
from mtl_dist.runs.evaluation import evaluate_run
from tests.browser import chromium
from tests.ranks import RankPool
from tests.tiny_datasets import HEIGHT, WIDTH, image_of
from tests.tiny_runs import train_run
from tests.undrawn import drawn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    with drawn():
        train_run(recipe, path, ["train.evaluate_at_end=true", "train.epochs=2"])
    return path


def test_a_finished_run_holds_what_the_design_names(run: Path) -> None:
    for name in [
        "recipe.yaml",
        "environment.json",
        "data.json",
        "class_names.json",
        "log.txt",
        "metrics.jsonl",
        "history.json",
        "status.json",
        "tensorboard",
        "checkpoints/best.json",
        "evaluation/metrics.json",
        "learning_curves.png",
    ]:
        assert (run / name).exists(), name
    assert not [path for path in run.rglob("*.tmp")]
    classes = json.loads((run / "class_names.json").read_text())
    assert classes["digit"] == ["a", "b", "c"]
    history = json.loads((run / "history.json").read_text())
    assert len(history["epoch"]) == 2
    assert {"loss", "digit/loss", "shape/loss"} <= history["train"].keys()
    assert {"loss", "digit/accuracy", "value/mae", "tags/macro_f1", "shape/dice"} <= history["val"].keys()


def test_every_labelled_sample_of_a_split_is_counted_once(run: Path, recipe: Path) -> None:
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    manifest = json.loads((recipe.parent / "tiny" / "dataset.json").read_text())
    for split in ("val", "test"):
        for task, facts in manifest["splits"][split]["labels"].items():
            assert metrics[split][task]["num_samples"] == facts["present"], (split, task)


def test_a_finished_run_has_a_row_for_each_evaluated_sample(run: Path, recipe: Path) -> None:
    from pyarrow import parquet

    from mtl_dist.prediction.evaluated import read_predictions
    from mtl_dist.run_folder import RunFolder

    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    manifest = json.loads((recipe.parent / "tiny" / "dataset.json").read_text())
    for split in ("val", "test"):
        table = read_predictions(RunFolder.open(run), split)
        assert table is not None
        assert len(set(table.columns["key"])) == len(table) == manifest["splits"][split]["num_samples"]
        for task, facts in manifest["splits"][split]["labels"].items():
            assert len(table.of_task(task)["loss"]) == facts["present"], (split, task)
            mean = table.of_task(task)["loss"].mean()
            assert mean == pytest.approx(metrics[split][task]["loss"], rel=1e-4), (split, task)
        correct = table.of_task("digit")["correct"]
        assert correct.mean() == pytest.approx(metrics[split]["digit"]["accuracy"])
        rows = parquet.read_table(run / "evaluation" / f"{split}_predictions.parquet").to_pylist()
        assert list(rows[0]) == list(table.columns)
        assert [row["key"] for row in rows] == table.columns["key"].tolist()
    baselines = json.loads((run / "evaluation" / "baselines.json").read_text())
    assert baselines["val"]["digit"]["name"] == "majority"
    assert {"accuracy", "macro_f1", "auroc"} <= baselines["val"]["digit"]["metrics"].keys()
    for split, tasks in baselines.items():  # the main metric of every kind has a constant answer's to beat
        for name, settings in load_recipe(run / "recipe.yaml").tasks.items():
            assert settings.compared[0] in tasks[name]["metrics"], (split, name)


def test_two_ranks_write_the_rows_of_one(run: Path, ranks: RankPool, tmp_path: Path) -> None:
    from mtl_dist.prediction.evaluated import read_predictions
    from mtl_dist.run_folder import RunFolder
    from mtl_dist.runs.evaluation import evaluate_run

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "evaluation" / "test_predictions.csv").unlink()
    assert ranks.run(evaluate_run, copy, "test", None, True) == ["test", "test"]
    one, two = (read_predictions(RunFolder.open(path), "test") for path in (run, copy))
    assert one is not None
    assert two is not None
    assert list(one.columns) == list(two.columns)
    for name, values in one.columns.items():
        if values.dtype == object:
            assert values.tolist() == two.columns[name].tolist(), name
        else:
            np.testing.assert_allclose(two.columns[name], values, rtol=1e-3, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------- the page
@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mtl_dist.report.page.write import write_report

    return write_report([run], tmp_path_factory.mktemp("page") / "page.html")


def test_a_page_is_one_file_with_every_task_and_nothing_from_elsewhere(page: Path, run: Path) -> None:
    text = page.read_text()
    assert len(text) < 3_000_000
    for task in ("digit", "value", "tags", "shape"):
        assert f"<h2>{task}</h2>" in text
    for title in (
        "Confusion matrix",
        "Calibration",
        "ROC",
        "Predicted over label",
        "Worst",
        "Dice of each map",
    ):
        assert title in text, title
    assert "majority: " in text
    assert text.count("data:image/jpeg;base64,") >= 9
    for word in ("<script", "http:", "https:", "@import", "url("):
        assert word not in text, word


def test_a_page_has_no_path_and_no_host_in_it(page: Path, run: Path) -> None:
    import platform

    text = page.read_text()
    assert "…/tiny" in text
    for folder in (run.parent, *run.parent.parents):
        assert folder == Path("/") or str(folder) + "/" not in text
    assert f">{platform.node()}<" not in text


def test_what_a_class_is_called_is_text_on_a_page(run: Path, tmp_path: Path) -> None:
    from mtl_dist.report.page.write import write_report

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    data = (copy / "data.json").read_text()
    (copy / "data.json").write_text(data.replace('"thing"', '"<img src=x onerror=alert(1)>"'))
    text = write_report([copy], pictures=False).read_text()
    assert "<img" not in text
    assert "&lt;img src=x" in text


def test_runs_side_by_side_begin_with_what_differs(run: Path, tmp_path: Path) -> None:
    from mtl_dist.report.page.write import write_report

    other = tmp_path / "other"
    shutil.copytree(run, other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("lr: 0.003", "lr: 0.004"))
    text = write_report([run, other], tmp_path / "two.html").read_text()
    differs = text.split("What differs")[1].split("Results")[0]
    assert "<td>optim.lr</td><td>0.003</td><td>0.004</td>" in differs
    assert differs.count("<tr>") == 2
    with pytest.raises(UserError, match=r"--out .*expected a folder that is there"):
        write_report([run], tmp_path / "nowhere" / "page.html")
    with pytest.raises(UserError, match="expected a run folder, found a file"):
        write_report([run / "recipe.yaml"], tmp_path / "page.html")
    with pytest.raises(UserError, match="twice"):
        write_report([run, run], tmp_path / "same.html")


def test_a_page_says_why_it_has_no_pictures_and_where_nothing_is_on_the_machine(
    run: Path, tmp_path: Path
) -> None:
    from mtl_dist.report.page.write import write_report

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("path: /", "path: /elsewhere/"))
    text = write_report([copy]).read_text()
    assert "No pictures: the data of this run cannot be read here (" in text
    assert "found" in text.split("No pictures: ")[1].split("<")[0]
    assert "/elsewhere" not in text


def test_a_page_says_why_it_has_no_curves_of_the_machine(run: Path, tmp_path: Path) -> None:
    from mtl_dist.report.page.write import write_report

    assert "Fewer than two steps were logged" not in write_report([run], tmp_path / "a.html").read_text()
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["kind"] != "step"))
    machine = write_report([copy], pictures=False).read_text().split("<h2>Machine</h2>")[1]
    assert "Fewer than two steps were logged" in machine.split("</section>")[0]


def test_a_folder_of_runs_stands_for_those_that_have_begun_with_val_as_measured_in_training(
    run: Path, tmp_path: Path
) -> None:
    from mtl_dist.report.page.write import write_report

    for name in ("a", "b", "waiting"):
        shutil.copytree(run, tmp_path / "sweep" / name)
        shutil.rmtree(tmp_path / "sweep" / name / "evaluation")
    (tmp_path / "sweep" / "waiting" / "data.json").unlink()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    text = write_report([tmp_path / "sweep"], tmp_path / "two.html").read_text()
    assert "2 runs side by side" in text
    results = text.split("Results")[1].split("Curves")[0]
    row = next(row for row in results.split("<tr>") if "<td>digit</td><td>accuracy</td>" in row)
    assert "–" not in row
    assert "Not evaluated" not in results


@pytest.mark.parametrize(
    ("width", "colours", "background"),
    [(390, "light", "rgb(255, 255, 255)"), (1200, "dark", "rgb(17, 20, 23)")],
)
def test_a_browser_shows_a_page_without_an_error_and_a_phone_without_scrolling_sideways(
    page: Path, width: int, colours: str, background: str
) -> None:
    with chromium(page.as_uri(), width, colours) as shown:
        shown.check()
        assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == background


def test_a_printed_page_is_light_and_hides_and_cuts_nothing(page: Path) -> None:
    with chromium(page.as_uri(), 700, "dark") as shown:
        shown.page.emulate_media(media="print", color_scheme="dark")
        shown.check()
        assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert shown.page.evaluate("[...document.querySelectorAll('details pre, details table')].length") > 1
        for which, holds in (
            ("details > :not(summary)", "e.checkVisibility() && e.offsetHeight > 0"),
            ("table", "e.getBoundingClientRect().right <= innerWidth"),
        ):
            assert shown.page.evaluate(f"[...document.querySelectorAll('{which}')].every(e => {holds})")


# ---------------------------------------------------------------- again
def test_evaluating_again_gives_the_same_figures(run: Path) -> None:
    from mtl_dist.run_folder import RunFolder
    from mtl_dist.runs.evaluation import evaluate_run

    before = RunFolder(run).read_metrics()
    (run / "evaluation" / "metrics.json").unlink()
    assert evaluate_run(run) == "test"
    again = RunFolder(run).read_metrics()
    assert again["test"].keys() == before["test"].keys()
    for task, metrics in before["test"].items():
        defined = {name: value for name, value in metrics.items() if value is not None}
        assert {name: again["test"][task][name] for name in defined} == pytest.approx(defined, rel=1e-4)
    with pytest.raises(UserError, match="--split"):
        evaluate_run(run, "holdout")


def test_other_weights_than_the_best_are_measured_under_a_name_of_their_own(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = mtl_dist.Run(copy).metrics
    last = mtl_dist.Run(copy).evaluate("val", checkpoint="last")
    assert mtl_dist.Run(copy).metrics == {**before, "val-last": last}
    newest = max(int(path.name.removeprefix("step_")) for path in (copy / "checkpoints").glob("step_*"))
    assert mtl_dist.Run(copy).evaluate("val", checkpoint=newest) == last
    with pytest.raises(UserError, match=r"whose best is kept \(none, without monitor\.per_task\)"):
        mtl_dist.Run(copy).evaluate("val", checkpoint="best/digit")


def test_temperatures_are_fitted_on_val_kept_and_used_where_they_are_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)
    image = image_of(5)
    with pytest.raises(UserError, match=r"expected temperatures for step_.*mtl evaluate .* --temperature"):
        mtl_dist.load(again, temperature=True)
    evaluate_run(again, temperature=True)
    said = capsys.readouterr()
    assert "temperatures are fitted on val" in said.err
    assert "Probabilities on test by temperature" in said.out
    (temperatures,) = json.loads((again / "evaluation" / "temperatures.json").read_text()).values()
    assert temperatures.keys() == {"digit", "tags"}
    test = json.loads((again / "evaluation" / "calibration.json").read_text())["test"]
    assert test["digit"]["temperature"] == temperatures["digit"]
    evaluate_run(again, "val", temperature=True)
    assert "fitted on val, which is measured" in capsys.readouterr().err
    val = json.loads((again / "evaluation" / "calibration.json").read_text())["val"]
    assert val["digit"]["temperature"] == pytest.approx(temperatures["digit"], rel=1e-9)
    assert val["digit"]["after"]["nll"] <= val["digit"]["before"]["nll"]
    plain, scaled = mtl_dist.load(again), mtl_dist.load(again, temperature=True)
    assert scaled.tasks["digit"].temperature == pytest.approx(temperatures["digit"])
    one, other = plain.predict(image)["digit"], scaled.predict(image)["digit"]
    assert one["class_id"] == other["class_id"]
    assert one["probabilities"] != other["probabilities"]
    assert plain.tasks["digit"].temperature == 1
    with pytest.raises(UserError, match="expected the best weights, for which temperatures are kept"):
        mtl_dist.load(again, checkpoint="last", temperature=True)


def test_without_a_test_split_a_run_is_evaluated_on_val_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = load_recipe(copy / "recipe.yaml")
    data = recipe.data.model_copy(update={"test": ()})
    (copy / "recipe.yaml").write_text(to_yaml(recipe.model_copy(update={"data": data})))
    assert set(mtl_dist.Run(copy).evaluate()) == {"digit", "value", "tags", "shape"}
    assert "split    val: the data has no test split" in capsys.readouterr().err


def test_a_picture_is_the_same_as_path_bytes_image_and_array(run: Path, tmp_path: Path) -> None:
    array = image_of(5)
    path = tmp_path / "five.png"
    Image.fromarray(array).save(path)
    predictor = mtl_dist.load(run)
    answers = predictor.predict_many([path, str(path), path.read_bytes(), Image.fromarray(array), array])
    for answer in answers:
        assert answer["digit"]["class_name"] == answers[0]["digit"]["class_name"]
        assert answer["digit"]["probabilities"] == pytest.approx(
            answers[0]["digit"]["probabilities"], rel=1e-5
        )
        assert answer["value"]["unit"] == "mm"
        assert sum(answer["digit"]["probabilities"].values()) == pytest.approx(1)
        assert np.array_equal(answer["shape"]["mask"], answers[0]["shape"]["mask"])
        assert answer["shape"]["mask"].shape == (HEIGHT, WIDTH)
    assert predictor.predict(path)["value"]["value"] == pytest.approx(answers[0]["value"]["value"], rel=1e-5)


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad", "{short_side: 10, crop: 8}"])
def test_masks_come_back_at_the_image_s_own_size_whatever_the_resizing(
    recipe: Path, tmp_path: Path, resize: str
) -> None:
    train_run(recipe, tmp_path / "run", [f"data.resize={resize}", "train.max_steps=1"])
    predictor = mtl_dist.load(tmp_path / "run")
    for height, width in ((8, 8), (5, 17), (40, 9)):
        mask = predictor.predict(np.zeros((height, width, 3), np.uint8))["shape"]["mask"]
        assert mask.shape == (height, width)


def test_debug_shows_what_the_model_sees_and_overfits_one_batch(recipe: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    loaded = load_recipe(recipe, ["tasks.tags=null", "optim.lr=1e-2", "data.augment=strong"])
    assert overfit.overfit_one_batch(loaded, Console(file=said, width=200), tmp_path)
    assert said.getvalue().count("overfitted") == 3
    assert "images: (8, 3, 8, 8) uint8" in said.getvalue()
    for part in (
        "backbone: ",
        "heads.digit: ",
        "time of a batch of 8: loading ",
        "step  10  ",
        "digit accuracy ",
    ):
        assert part in said.getvalue()
    with Image.open(tmp_path / "debug" / "batch.png") as picture:
        assert picture.width > 800  # four images of 208 pixels; twice two rows of them
        assert picture.height > 4 * 208


def test_debug_names_the_shapes_when_something_breaks(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a head of the wrong size")

    monkeypatch.setattr(overfit, "_overfit", broken)
    with pytest.raises(RuntimeError) as caught:
        overfit.overfit_one_batch(load_recipe(recipe), Console(file=io.StringIO()), tmp_path)
    assert "digit: (8,) int64" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=1e-7"], "at optim.lr=1e-07"),
        (["model.frozen=true"], "The backbone is frozen"),
        (["model.mean=[1000,1000,1000]", "model.std=[1,1,1]", "optim.lr=1e-7"], "far from 0 and 1"),
        (["tasks.digit.weight=0"], "Its weight is 0: try tasks.digit.weight=1"),
    ],
)
def test_debug_says_what_keeps_a_task_from_being_learnt(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: str
) -> None:
    monkeypatch.setattr(overfit, "MAX_STEPS", 40)
    said = io.StringIO()
    assert not overfit.overfit_one_batch(
        load_recipe(recipe, overrides), Console(file=said, width=400), tmp_path
    )
    assert "NOT overfitted" in said.getvalue()
    assert expected in said.getvalue()


def test_debug_decides_nothing_where_the_time_was_enough_for_a_few_steps(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overfit, "MAX_SECONDS", 0.0)
    said = io.StringIO()
    assert not overfit.overfit_one_batch(load_recipe(recipe), Console(file=said, width=400), tmp_path)
    assert "NOT overfitted" not in said.getvalue()
    assert said.getvalue().count("not decided: its loss went from ") >= 2
    assert said.getvalue().count("0 s were enough for 1 step, which decide little.") == 1


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("(output[:, 0] - 1e6).log().abs()", "Its loss was nan at step 1 (log made it of finite numbers)"),
        (
            "(output[:, 0] * 0).sqrt()",
            "The gradient was not finite at step 1 (Function 'SqrtBackward0' returned",
        ),
    ],
)
def test_debug_names_the_operation_that_is_not_finite_from_the_start(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, expected: str
) -> None:
    module = f"broken_{len(broken)}"
    (tmp_path / f"{module}.py").write_text(
        "from dataclasses import dataclass\n\nimport torch\n\nfrom mtl_dist.tasks.task import Loss\n\n\n"
        "@dataclass(frozen=True)\nclass Broken(Loss):\n    num_outputs = 1\n\n"
        f"    def numerators(self, output, target):\n        return {broken}\n\n"
        "    def denominators(self, target):\n        return torch.ones(len(target))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    said = io.StringIO()
    loaded = load_recipe(recipe, [f"tasks.value.loss={module}.Broken"])
    assert not overfit.overfit_one_batch(loaded, Console(file=said, width=400), tmp_path)
    assert expected in said.getvalue()
    assert "digit" in said.getvalue().split("wanted")[1]


def test_the_debugger_opens_where_it_is_wanted(recipe: Path, tmp_path: Path) -> None:
    source = "from mtl_dist.cli import main; import mtl_dist.debug.overfit as o; o.open_data = None; main()"
    command = [sys.executable, "-c", source, "train", str(recipe), "--debug", "--pdb"]
    done = subprocess.run(command, input="w\nq\n", capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert "(Pdb)" in done.stdout
    assert "'NoneType' object is not callable" in done.stderr
    assert done.returncode == 1
