"""A run goes on with the samples and the targets that it began with, or it is another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe, load_recipe, refuse_other_run

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
