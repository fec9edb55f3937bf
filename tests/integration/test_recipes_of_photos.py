"""The recipes for photographs, each from preparing to predicting, on the real data."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import mtl_dist
from mtl_dist.cli import app
from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe, load_recipe
from tests.undrawn import drawn

pytestmark = pytest.mark.slow

ROOT = Path(mtl_dist.__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
QUICK = ["data.image_size=32", "data.workers=0", "train.max_steps=1", "train.global_batch=8"]


@dataclass(frozen=True)
class Case:
    """A recipe, the preparations that its page names (after `mtl prepare`), and an image to predict."""

    recipe: str
    prepare: tuple[str, ...]
    image: tuple[str, str]
    every: int = 1
    """Of the archive one in so many files is prepared."""


CASES = [
    Case(
        "cats",
        (
            "folders cat-breed/cat-breed.zip data/cat-breed --task breed",
            "folders cat-emotion/cat-emotion.zip data/cat-emotion --task emotion",
        ),
        ("cat-breed/cat-breed.zip", "val/Bengal/"),
    ),
    Case(
        "skin",
        (
            "table skin-lesions/skin-lesions.zip data/skin --classification diagnosis=label "
            "--segmentation lesion=masks --regression age=age --unit age=years",
        ),
        ("skin-lesions/skin-lesions.zip", "images/val/"),
    ),
    Case(
        "cifar10",
        ("folders cifar10/cifar10.zip data/cifar10 --task object --mask shape=otsu --val 0.1",),
        ("cifar10/cifar10.zip", "test/ship/"),
        every=5,
    ),
    Case(
        "pets",
        (
            "table pets-seg/pets-seg.zip data/pets --classification breed=breed --classification "
            "species=species --segmentation animal=trimaps "
            "--classes animal=2:background,1:animal,3:border",
        ),
        ("pets-seg/pets-seg.zip", "images/"),
    ),
]


def mtl(words: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        app(list(words), prog_name="mtl")
    return int(ended.value.code or 0)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.recipe)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A directory in which the recipe's datasets are prepared and one step of it is trained."""
    case: Case = request.param
    for line in case.prepare:
        if not (DATA / line.split()[1]).exists():
            pytest.skip(f"expected {line.split()[1]} in {DATA}")
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp(case.recipe))
    for line in case.prepare:
        kind, source, *rest = line.split()
        taken = thinned(DATA / source, case.every)
        assert mtl(["prepare", kind, str(taken), *rest, "--workers", "1"]) == 0
    from mtl_dist.runs.train import train

    with drawn():
        train(recipe_of(case), Path("run"))
    yield case
    os.chdir(before)


def thinned(archive: Path, every: int) -> Path:
    """One in `every` files of an archive, as an archive here."""
    if every == 1:
        return archive
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(archive.name, "w") as part:
        for name in [name for name in whole.namelist() if not name.endswith("/")][::every]:
            part.writestr(name, whole.read(name))
    return Path(archive.name)


def recipe_of(case: Case, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "configs" / f"{case.recipe}.yaml", [*QUICK, *overrides])


def image_of(case: Case) -> bytes:
    archive, folder = case.image
    with zipfile.ZipFile(DATA / archive) as file:
        return file.read(
            next(name for name in sorted(file.namelist()) if name.startswith(folder) and "." in name)
        )


def test_a_step_of_the_recipe_leaves_everything_that_a_run_does(case: Case) -> None:
    recipe = recipe_of(case)
    metrics = json.loads(Path("run/evaluation/metrics.json").read_text())
    history = json.loads(Path("run/history.json").read_text())
    for split, of_tasks in metrics.items():
        assert set(of_tasks) == set(recipe.tasks)
        for name, task in recipe.tasks.items():
            assert of_tasks[name]["num_samples"] > 0
            matrix = Path(f"run/evaluation/{split}_{name}_confusion")
            has_classes = task.kind != "regression"
            assert matrix.with_suffix(".csv").exists() == matrix.with_suffix(".png").exists() == has_classes
    assert {"loss", *(f"{name}/loss" for name in recipe.tasks)} <= set(history["val"])
    for name in ("class_names.json", "recipe.yaml", "learning_curves.png", "checkpoints/best.json"):
        assert (Path("run") / name).exists(), name
    assert list(Path("run/tensorboard").iterdir())


def test_the_run_answers_for_a_photograph(case: Case) -> None:
    predictor = mtl_dist.load("run")
    answer = predictor.predict(image_of(case), threshold=0.5)
    names = json.loads(Path("run/class_names.json").read_text())
    for name, task in recipe_of(case).tasks.items():
        if task.kind == "classification":
            assert answer[name]["class_name"] == names[name][answer[name]["class_id"]]
            assert sum(answer[name]["probabilities"].values()) == pytest.approx(1)
        elif task.kind == "segmentation":
            assert answer[name]["mask"].max() < len(names[name])
            assert answer[name]["area_ratio"] == pytest.approx(float(np.mean(answer[name]["mask"] > 0)))
        else:
            assert answer[name]["unit"] == "years"


def test_a_recipe_on_data_that_it_does_not_fit_is_refused_before_training(case: Case) -> None:
    from mtl_dist.runs.train import train

    first = next(iter(recipe_of(case).tasks))
    misspelt = [f"tasks.{first}s={{kind: classification}}"]
    another = [f"tasks.{first}={{kind: regression}}", "monitor.metric=val/loss"]
    with pytest.raises(UserError, match=rf"tasks\.{first}s: expected a task .* Did you mean {first}"):
        train(recipe_of(case, *misspelt), Path("refused"))
    with pytest.raises(UserError, match=rf"tasks\.{first}\.kind: expected classification, as the dataset"):
        train(recipe_of(case, *another), Path("refused"))
    assert not Path("refused").exists()


def test_masks_of_another_number_of_classes_are_refused_before_training(case: Case) -> None:
    if case.recipe != "pets":
        return
    from mtl_dist.runs.train import train

    with pytest.raises(
        UserError, match=r"tasks\.animal\.loss\.kind: expected cross_entropy or dice for masks of 3"
    ):
        train(recipe_of(case, "tasks.animal.loss={kind: bce_dice}"), Path("refused"))
