"""Recipes are read strictly, every mistake is one line that helps, and what is written reads back equal."""

# ruff: noqa: E501 (error lines are quoted whole)
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from mtl_dist.config.errors import nearest, suggest
from mtl_dist.config.loading import load_settings, to_yaml
from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.recipe import load_recipe


class CrossEntropy(Settings):
    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Focal(Settings):
    kind: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0)] = 2.0


class Classification(Settings):
    kind: Literal["classification"] = "classification"
    weight: Annotated[float, Field(ge=0, description="Remove the task to switch it off.")] = 1.0
    loss: Annotated[CrossEntropy | Focal, Field(discriminator="kind")] = CrossEntropy()


class Regression(Settings):
    kind: Literal["regression"] = "regression"
    weight: Annotated[float, Field(ge=0)] = 1.0
    unit: str = ""
    clip: Annotated[float, Field(gt=0)] | None = None


Task = Annotated[Classification | Regression, Field(discriminator="kind")]


class Source(Settings):
    path: Path
    share: Annotated[float, Field(gt=0)] = 1.0


class Adam(Settings):
    kind: Literal["adam"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


class Sgd(Settings):
    kind: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)]
    momentum: float = 0.9


class Augment(Settings):
    flip: bool = True
    sizes: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _not_both(self) -> Augment:
        if self.flip and self.sizes == (13,):
            raise ValueError("sizes: expected no 13 with flip, found 13. Take another size.")
        return self


class Train(Settings):
    epochs: Annotated[int, Field(ge=1)] = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: Literal["off", "stage"] = "off"
    ema: float | None = 0.99


class Recipe(Settings):
    tasks: Mapping[str, Task]
    data: Annotated[tuple[Source, ...], Field(min_length=1)] = (Source(path=Path("data")),)
    window: Literal["off", "full"] | Annotated[int, Field(ge=1)] | Augment = "full"
    optim: Annotated[Adam | Sgd, Field(discriminator="kind")] = Adam()
    train: Train = Train()
    task_lr: Mapping[str, float] = {}
    derive: Mapping[int, int] = {}
    notes: Mapping[str, str | None] = {}

    @model_validator(mode="after")
    def _fit(self) -> Recipe:
        unknown = [name for name in self.task_lr if name not in self.tasks]
        if unknown:
            raise ValueError("\n".join(f"task_lr.{name}: expected a task, found {name}." for name in unknown))
        return self


TWO_TASKS = "tasks: {breed: {kind: classification}, age: {kind: regression}}\n"


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_settings(Recipe, path, overrides)


def lines(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load(folder, text, *overrides)
    return str(error.value).replace(f"{folder}/", "").splitlines()


# ---------------------------------------------------------------- reading
def test_a_recipe_states_departures_and_the_rest_are_the_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, "tasks: {age: {kind: regression}}\ntrain: {epochs: 3}\ndata: [{path: a/b}]")
    assert recipe == Recipe(
        tasks={"age": Regression()}, train=Train(epochs=3), data=(Source(path=Path("a/b")),)
    )


@pytest.mark.parametrize(
    ("text", "epochs_lr_off"),
    [
        ("train: {epochs: 1_000, checkpointing: off}\noptim: {lr: 1e-3}", (1000, 1e-3, "off")),
        ("train: {epochs: +7, checkpointing: 'off'}\noptim: {lr: 1}", (7, 1.0, "off")),
        ("train: &t {epochs: 2}\nwindow: {<<: {flip: false}}\noptim: {lr: .5}", (2, 0.5, "off")),
    ],
)
def test_yaml_means_what_it_looks_like(
    tmp_path: Path, text: str, epochs_lr_off: tuple[int, float, str]
) -> None:
    recipe = load(tmp_path, TWO_TASKS + text)
    assert (recipe.train.epochs, recipe.optim.lr, recipe.train.checkpointing) == epochs_lr_off


def test_settings_are_frozen_and_strict_in_python_too() -> None:
    with pytest.raises(ValidationError):
        Train().epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Train(epochs="3")  # type: ignore[arg-type]


def test_references_lead_to_other_values_and_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", "/disk")
    text = "train: {epochs: 4}\nwindow: ${train.epochs}\ndata: [{path: '${oc.env:DATA_ROOT}/cats'}]"
    recipe = load(tmp_path, TWO_TASKS + text)
    assert recipe.window == 4
    assert recipe.data[0].path == Path("/disk/cats")


# ---------------------------------------------------------------- overrides
def test_an_override_takes_the_place_of_what_stood_there(tmp_path: Path) -> None:
    text = "tasks: {breed: {kind: classification, loss: {kind: cross_entropy, label_smoothing: 0.1}}}"
    recipe = load(
        tmp_path, text, "tasks.breed.loss={kind: focal, gamma: 3}", "train.epochs=2", "train.epochs=5"
    )
    assert recipe.tasks["breed"] == Classification(loss=Focal(gamma=3.0))
    assert recipe.train.epochs == 5


def test_null_takes_a_task_out_and_is_a_value_where_it_may_be_one(tmp_path: Path) -> None:
    recipe = load(tmp_path, TWO_TASKS, "tasks.age=null", "train.ema=null", "notes.by=null")
    assert list(recipe.tasks) == ["breed"]
    assert recipe.train.ema is None
    assert recipe.notes == {"by": None}


def test_a_section_without_its_kind_is_of_the_default_kind(tmp_path: Path) -> None:
    recipe = load(tmp_path, TWO_TASKS, "optim.lr=1e-4", "tasks.breed.loss.label_smoothing=0.2")
    assert recipe.optim == Adam(lr=1e-4)
    assert recipe.tasks["breed"] == Classification(loss=CrossEntropy(label_smoothing=0.2))


def test_a_number_in_the_path_of_an_override_is_an_index(tmp_path: Path) -> None:
    recipe = load(tmp_path, TWO_TASKS + "data: [{path: a}, {path: b}]", "data.1.share=2.5")
    assert [source.share for source in recipe.data] == [1.0, 2.5]


# ---------------------------------------------------------------- mistakes, one line each
@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "tasks.breed.weight=-1",
            "tasks.breed.weight: expected a number >= 0, found -1. Remove the task to switch it off.",
        ),
        (
            "train.epochs=0",
            "train.epochs: expected an integer >= 1, found 0. Leave it out for the default, 10.",
        ),
        ("train.epochs=1e3", "train.epochs: expected an integer >= 1, found 1000.0. Write 1000."),
        ("train.epochs=true", "train.epochs: expected an integer >= 1, found true. Leave it out for the default, 10."),
        ("optim.lr='1e-3'", 'optim.lr: expected a number > 0, found "1e-3". Remove the quotes.'),
        ("optim.lr=nan", 'optim.lr: expected a number > 0, found "nan". Leave it out for the default, 0.001.'),
        ("optim.lr=.nan", "optim.lr: expected a number > 0, found NaN. Leave it out for the default, 0.001."),
        ("optim.lr=null", "optim.lr: expected a number > 0, found null. Leave it out for the default, 0.001."),
        ("tasks.age.clip=0", "tasks.age.clip: expected a number > 0 or null, found 0."),
        ("tasks.age.unit=3", 'tasks.age.unit: expected text, found 3. Leave it out for the default, "".'),
        ("window={flip: yes}", 'window.flip: expected true or false, found "yes". Leave it out for the default, true.'),
        ("optim.betas=[1]", "optim.betas: expected a list of 2, each a number, found a list of 1."),
        ("optim.betas=1", "optim.betas: expected a list of 2, each a number, found 1."),
        ("optim.betas=[1, 2, 3]", "optim.betas: expected a list of 2, each a number, found a list of 3."),
        ("optim.betas.0=x", "optim.betas: expected a list of 2, each a number, found a mapping."),
        ("data=cats", 'data: expected a list of at least 1 item, each a mapping with keys among path, share, found "cats". Write [cats].'),
        ("data=[]", "data: expected a list of at least 1 item, each a mapping with keys among path, share, found an empty list."),
        ("data=[{path: 3}]", "data.0.path: expected a path, found 3."),
        ("data=[{share: 1}]", "data.0.path: expected a path, found nothing. Add it."),
        ("derive={a: 1}", 'derive.a: expected a key that is an integer, found "a".'),
        ("train=null", "train: expected a mapping with keys among epochs, precision, checkpointing, ema, found null. Leave it out for the defaults."),
        # words
        ("train.precision=bf61", 'train.precision: expected one of fp32, bf16, found "bf61". Did you mean bf16?'),
        ("optim.kind=adan", 'optim.kind: expected one of adam, sgd, found "adan". Did you mean adam?'),
        ("tasks.breed.loss.kind=focl", 'tasks.breed.loss.kind: expected one of cross_entropy, focal, found "focl". Did you mean focal?'),
        ("tasks.age=regresion", 'tasks.age: expected a mapping with kind one of classification, regression, found "regresion". Write {kind: regression}.'),
        ("tasks.sex={}", "tasks.sex.kind: expected one of classification, regression, found nothing. Add it."),
        ("tasks.age=3", "tasks.age: expected a mapping with kind one of classification, regression, found 3."),
        # a union without kinds
        ("window=fall", 'window: expected one of off, full or an integer >= 1 or a mapping, found "fall". Did you mean full?'),
        ("window.sizes=[a]", 'window.sizes.0: expected an integer, found "a".'),
        # unknown keys
        ("tasks.age.weigth=2", "tasks.age.weigth: unknown key for kind regression. Did you mean weight? Known keys: kind, weight, unit, clip."),
        ("tasks.breed.loss.gamma=2", "tasks.breed.loss.gamma: unknown key for kind cross_entropy. It belongs to focal. Known keys: kind, label_smoothing."),
        ("tasks.age.precision=bf16", "tasks.age.precision: unknown key for kind regression. Did you mean train.precision? Known keys: kind, weight, unit, clip."),
        ("optm.lr=1", "optm: unknown key. Did you mean optim? Known keys: tasks, data, window, optim, train, task_lr, derive, notes."),
        ("epochs=3", "epochs: unknown key. Did you mean train.epochs? Known keys: tasks, data, window, optim, train, task_lr, derive, notes."),
        # overrides that make no sense
        ("lr", "lr: expected an override a.b=value. Write for example optim.lr=1e-3."),
        ("train..epochs=1", "train..epochs=1: expected an override a.b=value. Write for example optim.lr=1e-3."),
        ("train.epochs.x=1", "train.epochs.x: expected a section at train.epochs, found 4."),
        ("data.7.path=x", "data.7.path: expected the number of an item of data, 0, found 7."),
        ("optim=[", """optim: expected a value in YAML, found "[" (expected the node content, but found '<stream end>'). Put text with signs in quotes."""),
        ("optim={lr: 1, lr: 2}", "optim: key lr appears twice in the value. Keep one."),
        ("tasks.bred=null", "tasks.bred: expected an entry to take out, found none. Did you mean breed? Entries: breed, age."),
        ("tasks.bred.weight=2", "tasks.bred.kind: expected one of classification, regression, found nothing. Add it. Did you mean tasks.breed?"),
        # references
        ("window=${train.epoch}", "window: expected a reference to a value that is stated, found ${train.epoch} (Interpolation key 'train.epoch' not found)."),
        ("window=${oc.env:NO_SUCH}", "window: expected a reference to a value that is stated, found ${oc.env:NO_SUCH} (Environment variable 'NO_SUCH' not found)."),
        ("tasks.age.unit=a${b", 'tasks.age.unit: expected ${a.b}, found "a${b". Write \\${ for the text ${ itself.'),
        ("tasks.age.unit='???'", "tasks.age.unit: expected a value, found ???. Give it: tasks.age.unit=VALUE."),
        # rules of our own
        ("window={sizes: [13]}", "window.sizes: expected no 13 with flip, found 13. Take another size."),
        ("task_lr={a: 1, b: 2}", "task_lr.a: expected a task, found a.\ntask_lr.b: expected a task, found b."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path: Path, override: str, line: str) -> None:
    text = TWO_TASKS + "data: [{path: a}]\ntrain: {epochs: 4}\n"
    assert lines(tmp_path, text, override) == line.splitlines()


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = "tasks:\n  age: {kind: regresion}\n  breed: {kind: classification, weight: -1}\n  breed: 3\ntrain: {epoch: 3}\n"
    assert lines(tmp_path, text, "optim.lr=0", "lr") == [
        "recipe.yaml:4: key breed appears twice, first in line 3. Keep one of them.",
        "lr: expected an override a.b=value. Write for example optim.lr=1e-3.",
        'tasks.age.kind: expected one of classification, regression, found "regresion". Did you mean regression?',
        "tasks.breed: expected a mapping with kind one of classification, regression, found 3.",
        "optim.lr: expected a number > 0, found 0. Leave it out for the default, 0.001.",
        "train.epoch: unknown key. Did you mean epochs? Known keys: epochs, precision, checkpointing, ema.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "recipe.yaml:1:6: this is not YAML: expected ',' or ']', but got '<stream end>'."),
        ("a: 1\n  b: 2", "recipe.yaml:2:4: this is not YAML: mapping values are not allowed here."),
        ("a:\n\tb: 1", "recipe.yaml:2:1: this is not YAML: found character '\\t' that cannot start any token. Indent with spaces."),
        ("a: *b", "recipe.yaml:1:4: this is not YAML: found undefined alias 'b'."),
        ("a: !!python/object:os.system x", "recipe.yaml:1:4: this is not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'."),
        ("? [a]\n: 1", "recipe.yaml:1:3: this is not YAML: a key that is not a word."),
        ("a: \x01", "recipe.yaml:1:4: this is not YAML: the character '\\x01'."),
        ("- 1", "recipe.yaml: expected a mapping (key: value), found a list of 1."),
        ("", "tasks: expected a mapping, found nothing. Add it."),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    assert lines(tmp_path, text) == [line]


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    for name in ("digits.yaml", "skin.yaml", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))

    def line(path: Path) -> str:
        with pytest.raises(UserError) as error:
            load_settings(Recipe, path)
        return str(error.value).replace(str(tmp_path), "configs")

    assert line(tmp_path / "digts.yaml") == (
        "configs/digts.yaml: expected a YAML file, found none. Did you mean configs/digits.yaml?"
    )
    assert line(tmp_path / "zebra.yaml") == (
        "configs/zebra.yaml: expected a YAML file, found none. YAML files in configs: "
        "digits.yaml, latin.yaml, skin.yaml."
    )
    assert (
        line(tmp_path / "no" / "x.yaml")
        == "configs/no/x.yaml: expected a YAML file, found no directory configs/no."
    )
    assert line(tmp_path) == "configs: expected a YAML file, found a directory. Name a file in it."
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "dataset.json").touch()
    assert line(tmp_path / "no") == (
        "configs/no: expected a YAML file, found a prepared dataset. Write a recipe for it: mtl init configs/no > "
        "mine.yaml"
    )
    assert line(tmp_path / "latin.yaml") == "configs/latin.yaml: expected UTF-8 text, found the byte 0xe9."


def test_a_long_list_of_choices_is_cut_and_the_nearest_is_named() -> None:
    names = [f"resnet{i}" for i in range(40)]
    assert suggest("resnet_7", names) == (
        f"Did you mean resnet7? Known: {', '.join(names[:15])}, ... (40 in all)."
    )
    assert nearest("Label-Smoothing", ["label_smoothing", "loss"]) == "label_smoothing"
    assert nearest("xyz", ["label_smoothing", "loss"]) is None


# ---------------------------------------------------------------- writing
texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "\x85",
        "a\u2028b",
        "\u2029",
        "off",
        "null",
        "1e-3",
        "010",
        "${a.b}",
        "\\${",
        "a\\\\${x}",
        "${",
        "true",
        "<<",
        "~",
        "12:30",
        "",
        " x ",
        "# y",
    ]
)
finite = st.floats(allow_nan=False, allow_infinity=False)
weights = st.floats(min_value=0, allow_infinity=False)
tasks = st.builds(
    Classification,
    weight=weights,
    loss=st.builds(Focal, gamma=weights) | st.just(CrossEntropy(label_smoothing=0.1)),
) | st.builds(
    Regression,
    weight=weights,
    unit=texts.filter(lambda text: text != "???"),
    clip=st.none() | st.just(5e-324),
)
recipes = st.builds(
    Recipe,
    tasks=st.dictionaries(texts, tasks, max_size=3),
    data=st.lists(st.builds(Source, path=st.sampled_from([Path("a b/c"), Path("/x:y"), Path("~")])), min_size=1, max_size=2).map(tuple),
    window=st.sampled_from(["off", "full", 3]) | st.builds(Augment, sizes=st.lists(st.integers(), max_size=40).map(tuple)),
    optim=st.builds(Sgd, lr=st.just(1e-300), momentum=finite),
    train=st.builds(Train, ema=st.none() | finite),
    derive=st.dictionaries(st.integers(-5, 5), st.integers()),
    notes=st.dictionaries(texts, st.none() | texts.filter(lambda text: text != "???")),
)  # fmt: skip


@settings(deadline=None)
@given(recipe=recipes)
def test_what_is_written_loads_into_an_equal_object(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8", newline="")
    assert load_settings(Recipe, path) == recipe


def test_what_is_written_states_the_defaults_and_reads_well(tmp_path: Path) -> None:
    recipe = load(tmp_path, "tasks: {breed: {kind: classification}}\ndata: [{path: data/cats}]")
    assert to_yaml(recipe) == (
        "tasks:\n"
        "  breed:\n"
        "    kind: classification\n"
        "    weight: 1.0\n"
        "    loss: {kind: cross_entropy, label_smoothing: 0.0}\n"
        "data:\n"
        "- {path: data/cats, share: 1.0}\n"
        "window: full\n"
        "optim: {kind: adam, lr: 0.001, betas: [0.9, 0.999]}\n"
        "train: {epochs: 10, precision: fp32, checkpointing: off, ema: 0.99}\n"
        "task_lr: {}\n"
        "derive: {}\n"
        "notes: {}\n"
    )
    assert json.loads(recipe.model_dump_json())["train"]["checkpointing"] == "off"


DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.train.path=x",
            "data.train.path: expected the number of an item of data.train, 0, found path.",
        ),
        (
            "data.train.-1.path=x",
            "data.train.-1.path: expected the number of an item of data.train, 0, found -1.",
        ),
        ("tasks.digit.metrics=[accuracy]", "tasks.digit.metrics: expected a mapping, found a list of 1."),
        (
            "model.head.hidden.0=3",
            "model.head.hidden: expected a list, each item an integer >= 1, found a mapping.",
        ),
    ],
)
def test_an_override_into_or_of_a_list_that_does_not_fit_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(DIGITS, [override])
    assert str(error.value) == said


def test_an_override_may_state_a_list_or_one_item_of_it() -> None:
    recipe = load_recipe(
        DIGITS,
        [
            "data.train=[{path: a}, {path: b}]",
            "data.train.1.path=c",
            "model.head.hidden=[8, 4]",
            "optim.lr=1",
        ],
    )
    assert [str(source.path) for source in recipe.data.train] == ["a", "c"]
    assert recipe.model.head.hidden == (8, 4)
    assert recipe.optim.lr == 1.0
