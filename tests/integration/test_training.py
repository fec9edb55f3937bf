"""Whole runs: resuming equals never stopping, two ranks equal one, missing labels harm nobody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from tests.tiny_runs import rows, tensors_at, train_run
from tests.undrawn import drawn

pytestmark = pytest.mark.slow

NUM_STEPS = 12  # 3 epochs of 30 samples, 8 at a time
EVERY_STEP = "train.checkpoint_every=1"


@pytest.fixture(scope="module")
def whole_runs(recipe: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run that never stopped, on one rank and on two, with a checkpoint of every step."""
    directory = tmp_path_factory.mktemp("whole")
    runs = {1: directory / "one", 2: directory / "two"}
    assert train_run(recipe, runs[1], [EVERY_STEP, "optim.ema=0.9"]) == "done"
    assert ranks.run(train_run, recipe, runs[2], [EVERY_STEP, "optim.ema=0.9"]) == ["done", "done"]
    return runs


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed just after the checkpoint of `step`."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return copy


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("step", [1, 4, 7, 11])
def test_resuming_equals_never_stopping_bit_for_bit(
    recipe: Path, ranks: RankPool, whole_runs: dict[int, Path], tmp_path: Path, num_ranks: int, step: int
) -> None:
    whole = whole_runs[num_ranks]
    resumed = cut_back(whole, tmp_path / "resumed", step)
    overrides = [EVERY_STEP, "optim.ema=0.9"]
    if num_ranks == 1:
        train_run(recipe, resumed, overrides)
    else:
        ranks.run(train_run, recipe, resumed, overrides)
    expected, found = tensors_at(whole, NUM_STEPS), tensors_at(resumed, NUM_STEPS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rows(resumed, "step") == rows(whole, "step")
    for ours, theirs in zip(rows(resumed, "epoch"), rows(whole, "epoch"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, nan_ok=True)


def test_resuming_passes_over_a_damaged_checkpoint(
    recipe: Path, whole_runs: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = cut_back(whole_runs[1], tmp_path / "resumed", 6)
    with open(resumed / "checkpoints" / "step_00000006" / "model.safetensors", "r+b") as file:
        file.seek(400)
        file.write(b"\x55")
    train_run(recipe, resumed, [EVERY_STEP, "optim.ema=0.9"])
    assert "step_00000006" in capsys.readouterr().err
    expected, found = tensors_at(whole_runs[1], NUM_STEPS), tensors_at(resumed, NUM_STEPS)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_ranks_give_one_ranks_losses(recipe: Path, ranks: RankPool, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "one", dropout=False)
    ranks.run(train_run, recipe, tmp_path / "two", (), False)
    one, two = rows(tmp_path / "one", "step"), rows(tmp_path / "two", "step")
    assert len(one) == NUM_STEPS
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-5)
    for first, second in zip(rows(tmp_path / "one", "epoch"), rows(tmp_path / "two", "epoch"), strict=True):
        assert second == pytest.approx(first, rel=1e-4)


def test_accumulation_gives_the_same_updates(recipe: Path, tmp_path: Path) -> None:
    for accumulation in (1, 2, 4):
        # AdamW makes a whole step of a gradient that is 0 but for rounding, unless `eps` is larger than that.
        how = [f"train.accumulation={accumulation}", "optim.eps=1e-3"]
        train_run(recipe, tmp_path / str(accumulation), how, dropout=False)
    expected = tensors_at(tmp_path / "1", NUM_STEPS)
    for accumulation in (2, 4):
        found = tensors_at(tmp_path / str(accumulation), NUM_STEPS)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_going_on_with_another_number_of_ranks_continues_the_same_curve(
    recipe: Path, ranks: RankPool, tmp_path: Path
) -> None:
    train_run(recipe, tmp_path / "one", [EVERY_STEP], dropout=False)
    resumed = cut_back(tmp_path / "one", tmp_path / "resumed", 5)
    ranks.run(train_run, recipe, resumed, [EVERY_STEP], False)
    for first, second in zip(rows(tmp_path / "one", "step"), rows(resumed, "step"), strict=True):
        assert second == pytest.approx(first, rel=1e-5)


def test_a_task_without_any_training_label_trains_the_others_and_is_said(
    recipe: Path, tmp_path: Path
) -> None:
    data = tmp_path / "tiny"
    shutil.copytree(recipe.parent / "tiny", data)
    manifest = json.loads((data / "dataset.json").read_text())
    manifest["tasks"]["age"] = manifest["tasks"]["value"] | {"num_labelled": 0}
    for split in manifest["splits"].values():
        split["labels"]["age"] = {"present": 0, "missing": split["num_samples"], "class_counts": []}
    (data / "dataset.json").write_text(json.dumps(manifest))
    overrides = [f"data.train.0.path={data}", "tasks.age={kind: regression}", EVERY_STEP]
    assert train_run(recipe, tmp_path / "run", overrides) == "done"
    assert "task age has no label" in (tmp_path / "run" / "log.txt").read_text()
    first, last = tensors_at(tmp_path / "run", 1), tensors_at(tmp_path / "run", NUM_STEPS)
    moved = {name for name in first if name.startswith("model/") and not torch.equal(first[name], last[name])}
    assert any("heads.digit" in name for name in moved)
    assert not any("heads.age" in name for name in moved)
    assert all("step/age/loss" not in row for row in rows(tmp_path / "run", "step"))


def test_another_recipe_is_refused_in_the_folder_of_a_run(recipe: Path, whole_runs: dict[int, Path]) -> None:
    from mtl_dist.errors import UserError

    with pytest.raises(UserError, match=r"train\.seed.*--run-dir"):
        train_run(recipe, whole_runs[1], ["train.seed=5", "optim.ema=0.9"])


def test_a_run_that_ran_out_of_patience_stays_ended(recipe: Path, tmp_path: Path) -> None:
    overrides = ["monitor.patience=1", "monitor.min_delta=1e9", "train.epochs=9"]
    assert train_run(recipe, tmp_path / "run", overrides) == "done"
    ended = rows(tmp_path / "run", "step")
    assert len(ended) == 8  # the second epoch's evaluation is the first without improvement
    assert train_run(recipe, tmp_path / "run", overrides) == "done"
    assert rows(tmp_path / "run", "step") == ended


def test_evaluations_come_every_so_many_epochs_and_at_the_end(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", ["train.evaluate_every=2"])
    assert ["val/loss" in row for row in rows(tmp_path / "run", "epoch")] == [False, True, True]


def test_an_epoch_that_a_lengthened_run_finishes_is_recorded_whole(recipe: Path, tmp_path: Path) -> None:
    how = ["optim.schedule={kind: constant}", "train.epochs=1"]
    train_run(recipe, tmp_path / "whole", how)
    train_run(recipe, tmp_path / "run", [*how, "train.max_steps=2"])
    train_run(recipe, tmp_path / "run", how)
    part, epoch = rows(tmp_path / "run", "epoch")
    assert (part["step"], part["epoch"]) == (2, pytest.approx(16 / 30, rel=1e-5))
    assert [epoch] == rows(tmp_path / "whole", "epoch")


def test_a_sink_of_the_users_own_gets_the_rows_and_one_that_fails_hurts_nothing(
    recipe: Path, whole_runs: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_sinks.py").write_text(SINKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tracking = "tracking=[{kind: my_sinks.Broken}, {kind: my_sinks.Lines, file: lines.txt}]"
    how = [EVERY_STEP, "optim.ema=0.9", "train.evaluate_at_end=true", tracking]
    with drawn():
        assert train_run(recipe, tmp_path / "run", how) == "done"
    assert rows(tmp_path / "run", "step") == rows(whole_runs[1], "step")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("tracking by my_sinks.Broken failed and is switched off") == 1
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("step")] == [
        f"step {n}" for n in range(1, NUM_STEPS + 1)
    ]
    assert "picture learning_curves 12" in lines
    assert "picture test_digit_confusion 12" in lines
    assert any(line.startswith("result best/test/digit/accuracy") for line in lines)
    assert lines[-1] == "closed"


SINKS = """
from pathlib import Path

from mtl_dist.tracking.sink import RunFacts, Sink


class Lines(Sink):
    def __init__(self, run: RunFacts, file: Path) -> None:
        assert run.recipe["train"]["global_batch"] == 8 and run.run_id
        self.file = file.open("a")

    def row(self, row):
        print(row.kind, row.step, file=self.file)

    def picture(self, name, path, step):
        print("picture", name, step, file=self.file)

    def results(self, metrics, step):
        for name in metrics:
            print("result", name, file=self.file)

    def close(self):
        print("closed", file=self.file)
        self.file.close()


class Broken(Sink):
    def row(self, row):
        raise ConnectionError("gone")
"""


def test_another_decoder_is_said_at_a_resume(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mtl_dist.runs import opening

    monkeypatch.setattr(opening, "decoder_name", lambda: "decoder A")
    train_run(recipe, tmp_path / "run", ["train.max_steps=1"])
    train_run(recipe, tmp_path / "run", ["train.max_steps=2"])
    assert "decoder of images" not in capsys.readouterr().out
    monkeypatch.setattr(opening, "decoder_name", lambda: "decoder B")
    train_run(recipe, tmp_path / "run", ["train.max_steps=3"])
    assert "changed  decoder of images: decoder A before, decoder B from here on" in capsys.readouterr().out


def test_fp16_writes_down_its_loss_scale_and_the_steps_it_skipped(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", ["train.precision=fp16", "train.max_steps=2"])
    for row in rows(tmp_path / "run", "step"):
        assert row["loss_scale"] == 2.0 ** (16 - row["skipped_steps"])


def test_images_and_weights_lie_as_the_recipe_says_and_the_numbers_stay(recipe: Path, tmp_path: Path) -> None:
    for name in ("true", "false"):
        train_run(recipe, tmp_path / name, [f"train.channels_last={name}", "train.max_steps=3"])
    for first, second in zip(rows(tmp_path / "true", "step"), rows(tmp_path / "false", "step"), strict=True):
        assert second == pytest.approx(first, rel=1e-4)


def test_sync_batch_norm_on_a_cpu_is_refused_at_start(recipe: Path, tmp_path: Path) -> None:
    from mtl_dist.errors import UserError

    with pytest.raises(UserError, match=r"model\.norm: expected batch, group or frozen on CPUs, found sync"):
        train_run(recipe, tmp_path / "run", ["model.norm=sync"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_end_of_a_run_says_of_which_step_the_results_are_and_why(
    recipe: Path, tmp_path: Path, mode: str
) -> None:
    how = ["train.evaluate_at_end=true", "optim.lr=0.01", f"monitor={{metric: train/loss, mode: {mode}}}"]
    train_run(recipe, tmp_path / "run", how)
    losses = {row["step"]: row["train/loss"] for row in rows(tmp_path / "run", "epoch")}
    best = (min if mode == "min" else max)(losses, key=losses.__getitem__)
    assert (best == NUM_STEPS) == (mode == "min"), losses
    others = "" if best == NUM_STEPS else f"; the last, {NUM_STEPS}: {losses[NUM_STEPS]:.4f}"
    said = f"Results of step {best}, the best by train/loss ({losses[best]:.4f}{others}):"
    assert said in (tmp_path / "run" / "log.txt").read_text()
