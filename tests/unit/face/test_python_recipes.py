"""Recipes and importers from Python: files, dictionaries, lists; a mistake is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mtl_dist
from mtl_dist.errors import UserError
from mtl_dist.face import read_recipe
from mtl_dist.recipe import Recipe

TINY = {
    "tasks": {"digit": {"kind": "classification"}, "ink": {"kind": "segmentation"}},
    "data": {"train": [{"path": Path("data/digits")}], "image_size": [8, np.int64(8)]},
    "train": {"epochs": 2},
    "tracking": [],
}


def test_a_dictionary_is_read_as_a_file_with_lists_paths_and_numpys_numbers(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "tasks: {digit: {kind: classification}, ink: {kind: segmentation}}\n"
        "data: {train: [{path: data/digits}], image_size: [8, 8]}\ntrain: {epochs: 2}\ntracking: []\n"
    )
    given = read_recipe(TINY)
    assert given.name is None
    assert given.model_dump() == read_recipe(file, ["name=null"]).model_dump() | {"name": None}
    assert read_recipe(str(file)).name == "tiny"


def test_overrides_are_text_or_a_dictionary() -> None:
    texts = read_recipe(TINY, ["optim.lr=3e-4", "tasks.ink=null", "data.image_size=[4, 6]"])
    mappings = read_recipe(TINY, [{"optim.lr": 3e-4, "tasks.ink": None}, {"data.image_size": (4, 6)}])
    assert texts.model_dump() == mappings.model_dump()
    assert list(texts.tasks) == ["digit"]


def test_a_recipe_can_be_given_and_overridden() -> None:
    recipe = read_recipe(TINY)
    assert read_recipe(recipe) is recipe
    changed = read_recipe(recipe, ["train.epochs=5"])
    assert isinstance(changed, Recipe)
    assert changed.train.epochs == 5
    assert changed.model_dump(exclude={"train"}) == recipe.model_dump(exclude={"train"})


def test_the_dictionary_given_stays_as_it_is() -> None:
    before = repr(TINY)
    read_recipe(TINY, ["tasks.ink=null", "data.train.0.path=elsewhere"])
    assert repr(TINY) == before


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (TINY | {"optm": {}}, "optm: .*Did you mean optim"),
        (TINY | {"optim": {"lr": "3"}}, r'optim\.lr: expected .*found "3"'),
        (TINY | {"optim": {"lr": object()}}, r"^optim\.lr: expected a number, text, .*, found object\.$"),
        (3, "^recipe: expected a path, a dictionary or a Recipe, found int"),
        ("configs/digts.yaml", "found none. Did you mean configs/digits.yaml"),
    ],
)
def test_a_mistake_is_a_user_error(recipe: object, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(mtl_dist.__file__).parents[1])
    with pytest.raises(UserError, match=line):
        read_recipe(recipe)  # type: ignore[arg-type]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run folder, found no recipe\.yaml in it"):
        mtl_dist.Run(tmp_path)


def test_the_package_imports_without_torch() -> None:
    code = "import sys, mtl_dist; assert 'torch' not in sys.modules; mtl_dist.Run; mtl_dist.balance"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_importer_takes_text_for_paths_and_packing_options_by_name(tmp_path: Path) -> None:
    manifest = mtl_dist.prepare.digits(str(tmp_path / "digits"), workers=1, seed=3)
    assert set(manifest.tasks) == {"digit", "thickness", "ink"}
    assert (tmp_path / "digits" / "dataset.json").is_file()


def test_a_wrong_argument_of_an_importer_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^prepare\.digits: .*'sed'.*Its arguments are out, .*seed"):
        mtl_dist.prepare.digits("nowhere", sed=3)
    with pytest.raises(AttributeError, match=r"no importer 'photos'.*folders"):
        mtl_dist.prepare.photos  # noqa: B018
