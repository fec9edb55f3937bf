"""Tasks that a recipe leaves to its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_dist.config.loading import to_yaml
from mtl_dist.data.loader import open_data
from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe, load_recipe
from tests.tiny_datasets import TASKS, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("tasks") / "all", {"train": 8})


@pytest.fixture(scope="module")
def without_masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = {name: info for name, info in TASKS.items() if name != "shape"}
    return write_dataset(tmp_path_factory.mktemp("tasks") / "none", {"train": 8}, tasks=tasks)


def read(directory: Path, dataset: Path, tasks: str, *overrides: str, more: str = "") -> Recipe:
    path = directory / "recipe.yaml"
    path.write_text(f"{tasks}\ndata: {{train: [{{path: {dataset}}}], image_size: 8}}\n{more}")
    recipe = load_recipe(path, overrides)
    (directory / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(directory / "again.yaml").model_copy(update={"name": None}) == recipe.model_copy(
        update={"name": None}
    )
    return recipe


ALL = {"digit": 1.0, "value": 1.0, "tags": 1.0, "shape": 1.0}


@pytest.mark.parametrize(
    ("tasks", "overrides", "weights"),
    [
        ("", [], ALL),
        ("tasks: null", [], ALL),
        ('tasks: {"*": {}}', [], ALL),
        ('tasks: {"*": null}', [], ALL),
        ('tasks: {value: {weight: 0.5}, "*": {}}', [], ALL | {"value": 0.5}),
        ('tasks: {value: {kind: regression, weight: 0.5}, "*": {}}', [], ALL | {"value": 0.5}),
        ('tasks: {value: {}, "*": {weight: 3}}', [], dict.fromkeys(ALL, 3.0) | {"value": 1.0}),
        ('tasks: {value: null, "*": {}}', [], {"digit": 1.0, "tags": 1.0, "shape": 1.0}),
        ("tasks: {value: {weight: 0.5}, digit: {}}", [], {"value": 0.5, "digit": 1.0}),
        ("tasks: {value: {kind: regression}}", ["tasks.value.weight=2"], {"value": 2.0}),
        ("tasks: {value: {}}", ["tasks.digit.weight=2"], {"value": 1.0, "digit": 2.0}),
        ("tasks: {value: {}}", ["tasks.*={}"], ALL),
        ("", ["tasks.value.weight=0.5"], ALL | {"value": 0.5}),
        ("tasks: null", ["tasks.value.weight=0.5"], ALL | {"value": 0.5}),
        ("", ["tasks.value=null"], {"digit": 1.0, "tags": 1.0, "shape": 1.0}),
        ("", ["tasks.*.weight=2", "tasks.value=null"], {"digit": 2.0, "tags": 2.0, "shape": 2.0}),
        ("", ["tasks={value: {weight: 2}}"], {"value": 2.0}),
    ],
)
def test_what_a_recipe_does_not_say_of_its_tasks_is_the_datas(
    dataset: Path, tmp_path: Path, tasks: str, overrides: list[str], weights: dict[str, float]
) -> None:
    recipe = read(tmp_path, dataset, tasks, *overrides)
    assert {name: task.weight for name, task in recipe.tasks.items()} == weights
    assert all(task.kind == TASKS[name].kind for name, task in recipe.tasks.items())


def test_one_change_leaves_the_order_of_the_tasks_as_it_is(dataset: Path, tmp_path: Path) -> None:
    plain = read(tmp_path, dataset, "")
    for tasks, overrides in (('tasks: {shape: {weight: 2}, "*": {}}', ()), ("", ["tasks.shape.weight=2"])):
        assert list(read(tmp_path, dataset, tasks, *overrides).tasks) == list(plain.tasks)


@pytest.mark.parametrize(
    ("tasks", "overrides", "said"),
    [
        (
            'tasks: {valve: {weight: 2}, "*": {}}',
            [],
            "tasks.valve: expected a task of the training data, found none such. Did you mean value? "
            "Tasks in the data: digit, value, tags, shape.",
        ),
        (
            "",
            ["tasks.valve=null"],
            "tasks.valve: expected a task of the data to take out, found none such. Did you mean value? "
            "Tasks in the data: digit, value, tags, shape.",
        ),
        (
            'tasks: {value: {wieght: 2}, "*": {}}',
            [],
            "tasks.value.wieght: unknown key for kind regression. Did you mean weight?",
        ),
        ("tasks: {value: {weight: -1}}", ["optim.lr=0"], "optim.lr: expected a number > 0, found 0."),
        ("tasks: 3", [], "tasks: expected a mapping"),
        ("tasks: {}", [], "tasks: expected at least one task, found none."),
    ],
)
def test_a_mistake_in_such_tasks_is_said_as_any_other(
    dataset: Path, tmp_path: Path, tasks: str, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, dataset, tasks, *overrides)
    assert str(caught.value).startswith(said)


def test_data_that_is_not_there_is_said_once_all_else_is_right(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a prepared dataset, found no such directory"):
        read(tmp_path, tmp_path / "nowhere", "tasks: {value: {weight: 2}}")


OPTIONAL = "tasks: {digit: {kind: classification}, shape: {optional: true, loss: {kind: bce_dice}}}"
MORE = "optim: {task_lr: {shape: 0.1, digit: 0.2}}\nmodel: {heads: {shape: {kind: torch.nn.Identity}}}\n"


def test_an_optional_task_is_learnt_where_the_data_has_it(dataset: Path, tmp_path: Path) -> None:
    recipe = read(tmp_path, dataset, OPTIONAL)
    assert (list(recipe.tasks), recipe.absent_tasks) == (["digit", "shape"], ())
    assert recipe.tasks["shape"].kind == "segmentation"


def test_an_optional_task_that_the_data_lacks_is_left_out_with_all_that_is_said_of_it(
    without_masks: Path, tmp_path: Path
) -> None:
    recipe = read(tmp_path, without_masks, OPTIONAL, more=MORE)
    assert (list(recipe.tasks), recipe.absent_tasks) == (["digit"], ("shape",))
    assert (recipe.optim.task_lr, recipe.model.heads) == ({"digit": 0.2}, {})


def test_the_tasks_that_a_recipe_leaves_out_are_named(dataset: Path, tmp_path: Path) -> None:
    recipe = read(tmp_path, dataset, "tasks: {value: {}, tags: {}}")
    assert open_data(recipe.data, recipe.tasks).not_learnt == ("digit", "shape")
    everything = read(tmp_path, dataset, "")
    assert open_data(everything.data, everything.tasks).not_learnt == ()
