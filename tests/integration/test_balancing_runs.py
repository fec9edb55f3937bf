"""Balancing in whole runs: its state is in the checkpoint, its findings in the record, refusals at start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mtl_dist.data.disjoint_tasks import disjoint_tasks
from mtl_dist.data.loader import open_data
from mtl_dist.errors import UserError
from mtl_dist.recipe import load_recipe
from tests.tiny_balancing import GRAMIAN_METHODS, JACOBIAN_METHODS, LOSS_METHODS
from tests.tiny_datasets import TASKS, write_dataset
from tests.tiny_runs import rows, tensors_at, train_run

pytestmark = pytest.mark.slow

NUM_STEPS, CUT = 12, 9  # 3 epochs of 30 samples, 8 at a time; cut in the third, between two solves
RECIPE = """
tasks: {digit: {kind: classification}, value: {kind: regression}, tags: {kind: multilabel}}
data: {train: [{path: DATA}], image_size: 8, augment: standard, workers: 0, shuffle_window: 3}
model: {backbone: simple_cnn, norm: group, head: {hidden: [16], dropout: 0.2}}
optim: {lr: 3.0e-3, clip_norm: 1.0}
train: {epochs: 3, global_batch: 8, log_every: 1, evaluate_at_end: false, keep_last: 2, checkpoint_every: 9}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory / "tiny", {"train": 30})
    path = directory / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", str(directory / "tiny")))
    return path


@pytest.mark.parametrize("method", [*LOSS_METHODS, *GRAMIAN_METHODS, *JACOBIAN_METHODS])
def test_resuming_any_method_equals_never_stopping_bit_for_bit(
    recipe: Path, tmp_path: Path, method: str
) -> None:
    overrides = [f"balance.method={method}", "balance.diagnose_every=2"]
    if method in GRAMIAN_METHODS:
        overrides.append("balance.every=2")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_run(recipe, whole, overrides) == "done"
    expected = tensors_at(whole, NUM_STEPS)
    shutil.copytree(whole, resumed)
    for path in (resumed / "checkpoints").glob("step_*"):
        if path.name > f"step_{CUT:08d}":
            shutil.rmtree(path)
    assert (resumed / "checkpoints" / f"step_{CUT:08d}").is_dir()
    assert train_run(recipe, resumed, overrides) == "done"
    found = tensors_at(resumed, NUM_STEPS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for kind in ("step", "balance"):
        assert rows(resumed, kind) == rows(whole, kind)


def test_what_the_tasks_gradients_do_to_one_another_is_in_the_record(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", ["balance.method=equal", "balance.diagnose_every=5"])
    found = rows(tmp_path / "run", "balance")
    assert [row["step"] for row in found] == [1, 6, 11]
    for row in found:
        assert {"balance/cosine/digit/value", "balance/gradient_norm/tags", "balance/weight/digit"} <= set(
            row
        )
        assert -1 <= row["balance/cosine/digit/value"] <= 1
        assert row["balance/num_unconverged"] == 0


def test_without_diagnosis_nothing_is_written_and_the_run_is_the_same(recipe: Path, tmp_path: Path) -> None:
    for name, every in (("never", 0), ("always", 1)):
        overrides = ["balance.method=stch", f"balance.diagnose_every={every}", "train.max_steps=4"]
        train_run(recipe, tmp_path / name, overrides)
    assert rows(tmp_path / "never", "balance") == []
    assert rows(tmp_path / "never", "step") == rows(tmp_path / "always", "step")


def test_tasks_that_never_meet_in_a_sample_are_found(tmp_path: Path) -> None:
    one, other = "digit", "tags"
    for name in (one, other):
        write_dataset(tmp_path / name, {"train": 12}, tasks={name: TASKS[name]})
    write_dataset(tmp_path / "both", {"train": 12}, tasks={n: TASKS[n] for n in (one, other)})
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
tasks: {{{one}: {{kind: classification}}, {other}: {{kind: multilabel}}}}
data: {{train: [{{path: {tmp_path / one}}}, {{path: {tmp_path / other}}}], image_size: 8, workers: 0}}
model: {{backbone: simple_cnn, norm: group}}
balance: {{method: cagrad, level: features}}
train: {{epochs: 1, global_batch: 8}}
"""
    )
    recipe = load_recipe(path)
    assert disjoint_tasks(open_data(recipe.data, recipe.tasks)) == [(one, other)]
    with pytest.raises(UserError, match=f"balance.level: .* {one} and {other}"):
        train_run(path, tmp_path / "run")
    together = load_recipe(path, [f"data.train=[{{path: {tmp_path / 'both'}}}]"])
    assert disjoint_tasks(open_data(together.data, together.tasks)) == []
