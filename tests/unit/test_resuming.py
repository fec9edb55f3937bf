"""A run goes on with the samples and the targets that it began with, or it is another run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.resuming import RULES, changes, refuse_other_run, verdict_on

RECIPE = """
tasks: {digit: {kind: classification}, x0: {kind: regression}}
data: {train: [{path: data/digits}], image_size: 8}
"""


@pytest.fixture
def kept(tmp_path: Path) -> Recipe:
    return recipe(tmp_path)


def recipe(folder: Path, *overrides: str) -> Recipe:
    (folder / "run.yaml").write_text(RECIPE)
    return load_recipe(folder / "run.yaml", overrides)


@pytest.mark.parametrize(
    "override",
    [
        "data.train.0.path=data/other",
        "data.mixing={kind: equal}",
        "data.sampling={kind: class_balanced, task: digit}",
        "data.boxes={head: [x0, x0, x0, x0]}",
        "data.shuffle_window=3",
        "train.global_batch=32",
    ],
)
def test_another_order_or_meaning_of_the_samples_is_refused(
    kept: Recipe, tmp_path: Path, override: str
) -> None:
    name = override.partition("=")[0].removesuffix(".0.path")
    with pytest.raises(UserError, match=name):
        refuse_other_run(kept, recipe(tmp_path, override), tmp_path)


@pytest.mark.parametrize(
    "override", ["data.workers=5", "data.augment=strong", "data.blend={mixup: 0.2}", "data.cache.dir=/cache"]
)
def test_what_changes_neither_may_change(kept: Recipe, tmp_path: Path, override: str) -> None:
    refuse_other_run(kept, recipe(tmp_path, override), tmp_path)


def test_the_docs_have_the_table_of_what_may_change() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    table = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|$", text, re.MULTILINE))
    assert table == RULES


def test_every_section_of_a_recipe_is_in_the_table() -> None:
    assert {name.partition(".")[0] for name in RULES} == set(Recipe.model_fields)


def test_what_the_table_does_not_know_is_refused() -> None:
    assert verdict_on("moon.phase") == "refused"
    assert verdict_on("model.checkpointing") == "accepted"
    assert verdict_on("monitor.mean.val/digit/accuracy") == "the best restarts"


def test_each_accepted_change_is_one_line_with_both_values(kept: Recipe, tmp_path: Path) -> None:
    given = recipe(tmp_path, "optim.lr=0.5", "monitor.metric=val/digit/accuracy", "train.epochs=3")
    assert [change.describe() for change in changes(kept, given)] == [
        'monitor.metric: "val/loss" before, "val/digit/accuracy" from here on; the best evaluation restarts',
        "optim.lr: 0.001 before, 0.5 from here on",
        "train.epochs: 10 before, 3 from here on",
    ]


def test_a_part_that_is_set_or_left_out_is_one_accepted_change(kept: Recipe, tmp_path: Path) -> None:
    given = recipe(tmp_path, "data.blend={mixup: 0.2}")
    (change,) = changes(kept, given)
    assert change.describe() == "data.blend: null before, {mixup: 0.2, probability: 1.0} from here on"


def test_each_refused_cause_is_one_line_and_the_advice_comes_once(kept: Recipe, tmp_path: Path) -> None:
    given = recipe(
        tmp_path,
        "tasks.near={kind: depth}",
        "tasks.x0=null",
        "model.decoder={kind: fpn}",
        "model.adapter={kind: lora}",
        "balance={method: uncertainty}",
    )
    with pytest.raises(UserError) as refusal:
        refuse_other_run(kept, given, tmp_path)
    lines, there = str(refusal.value).splitlines(), f"as in {tmp_path / 'recipe.yaml'}, found"
    assert lines == [
        f'balance.method: expected "fixed" {there} "uncertainty".',
        f"model.adapter: expected null {there} lora.",
        f'model.decoder.kind: expected "unet" {there} "fpn".',
        f"tasks.near: expected none {there} depth.",
        f"tasks.x0: expected regression {there} none.",
        "Choose another --run-dir for another run.",
    ]


def test_a_task_with_the_name_of_a_setting_hides_no_other_task(kept: Recipe, tmp_path: Path) -> None:
    before = recipe(tmp_path, "tasks.kind={kind: regression}", "tasks.method={kind: regression}")
    after = recipe(
        tmp_path,
        "tasks.kind={kind: regression, weight: 2}",
        "tasks.method={kind: regression}",
        "tasks.x0.weight=3",
    )
    assert [change.key for change in changes(before, after)] == ["tasks.kind.weight", "tasks.x0.weight"]


def test_another_place_of_the_data_is_accepted_where_it_is_said(kept: Recipe, tmp_path: Path) -> None:
    moved = recipe(tmp_path, "data.train.0.path=elsewhere/digits")
    with pytest.raises(UserError, match="say --data-moved") as refusal:
        refuse_other_run(kept, moved, tmp_path)
    assert "{" not in str(refusal.value)
    assert [change.key for change in refuse_other_run(kept, moved, tmp_path, True)] == ["data.train.0.path"]
