"""Derived tasks: another task's classes by a map, in every place where a stored task is."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mtl_dist.config.loading import load_settings, to_yaml
from mtl_dist.data.facts import Identities, identities, source_differences
from mtl_dist.data.loader import Data, eval_loader, open_data, train_loader
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.packing import pack
from mtl_dist.importers.pixels import encoded_picture
from mtl_dist.recipe import Recipe, load_recipe
from tests.source_files import HERE

DIGITS = ("zero", "one", "two", "three")
SIZES = {"train": 24, "val": 8}


def digit_of(number: int) -> int | None:
    return None if number % 6 == 5 else number % 4


def write_numbers(out: Path, digits: Sequence[str] = DIGITS, with_digit: bool = True) -> Path:
    """Pictures whose grey is their number; every sixth has no digit. `value` is the number."""
    records: dict[str, list[Record]] = {}
    start = 0
    for split, size in SIZES.items():
        for number in range(start, start + size):
            labels: dict[str, Any] = {"value": float(number)}
            if with_digit and digit_of(number) is not None:
                labels["digit"] = digit_of(number)
            image = encoded_picture(np.full((8, 8), number, np.uint8))
            records.setdefault(split, []).append(Record(f"n{number:03d}", image, labels))
        start += size
    tasks = {"value": TaskSource("regression", unit="mm")}
    if with_digit:
        tasks = {"digit": TaskSource("classification", tuple(digits)), **tasks}
    pack(records, out, tasks, out.name, options=HERE)
    return out


PARITY = {
    "from": "digit",
    "map": {"zero": "even", "one": "odd", "2": "even", "3": 1},
    "classes": ["even", "odd"],
}
SMALL = {"from": "digit", "map": {"0": 2, "1": 0, "2": None, "3": None}}


def settings(*paths: Path, derive: dict[str, Any], **options: Any) -> DataSettings:
    stated = {
        "train": [{"path": str(path)} for path in paths],
        "image_size": 8,
        "augment": "none",
        "workers": 0,
        "derive": derive,
        **options,
    }
    return DataSettings.model_validate_json(json.dumps(stated))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbers(tmp_path_factory.mktemp("data") / "numbers")


def labels_seen(data: Data, split: str, task: str) -> dict[int, int | None]:
    """The label of each number in a split, from the batches."""
    if split == "train":
        loader = train_loader(
            data,
            seed=0,
            global_batch=5,
            accumulation=1,
            rank=0,
            world_size=1,
            start_position=0,
            end_position=data.num_train_samples,
            workers=0,
            pin_memory=False,
        )
    else:
        loader = eval_loader(data, split, batch_size=5, rank=0, world_size=1, workers=0)
    seen: dict[int, int | None] = {}
    for batch in loader:
        for i, valid in enumerate(batch.valid_B.tolist()):
            if valid:
                number = int(batch.images_BCHW[i, 0, 0, 0])
                has = bool(batch.labelled[task][i])
                seen[number] = int(batch.targets[task][i]) if has else None
    return seen


@pytest.mark.parametrize("image_size", [8, 16], ids=["small samples", "one by one"])
def test_every_sample_gets_the_mapped_class_of_its_label(numbers: Path, image_size: int) -> None:
    data = open_data(
        settings(numbers, derive={"parity": PARITY, "small": SMALL}, image_size=image_size),
        ["digit", "parity", "small"],
    )
    expected_parity = {None: None, 0: 0, 1: 1, 2: 0, 3: 1}
    expected_small = {None: None, 0: 2, 1: 0, 2: None, 3: None}
    for split, of_split in (("train", range(24)), ("val", range(24, 32))):
        assert labels_seen(data, split, "parity") == {n: expected_parity[digit_of(n)] for n in of_split}
        assert labels_seen(data, split, "small") == {n: expected_small[digit_of(n)] for n in of_split}


def test_the_facts_of_a_derived_task_are_counted(numbers: Path) -> None:
    data = open_data(settings(numbers, derive={"parity": PARITY, "small": SMALL}), ["parity", "small"])
    digits = [digit_of(number) for number in range(24)]
    counts = [digits.count(digit) for digit in range(4)]
    parity, small = data.task_infos["parity"], data.task_infos["small"]
    assert parity.classes == ("even", "odd")
    assert parity.class_counts == (counts[0] + counts[2], counts[1] + counts[3])
    assert parity.num_labelled == sum(counts)
    assert small.classes == ("0", "1", "2")
    assert small.class_counts == (counts[1], 0, counts[0])
    assert small.num_labelled == counts[0] + counts[1]


def test_classes_of_a_derived_task_can_be_balanced(numbers: Path) -> None:
    options = {"sampling": {"kind": "class_balanced", "task": "small"}}
    data = open_data(settings(numbers, derive={"small": SMALL}, **options), ["small"])
    assert set(labels_seen(data, "train", "small").values()) == {0, 2}


def test_a_dataset_without_the_task_has_no_labels_of_the_derived_one(numbers: Path, tmp_path: Path) -> None:
    other = write_numbers(tmp_path / "other", with_digit=False)
    data = open_data(settings(numbers, other, derive={"parity": PARITY}), ["parity", "value"])
    assert data.task_infos["parity"].num_labelled == 20
    other_only = settings(other, derive={"parity": PARITY})
    with pytest.raises(UserError, match=r"data.derive.parity.from: expected a task of the training data"):
        open_data(other_only, ["value"])


def test_datasets_with_other_class_order_are_mapped_by_name(numbers: Path, tmp_path: Path) -> None:
    by_name = {"from": "digit", "map": {"zero": 0, "one": 1, "two": 0, "three": 1}}
    turned = write_numbers(tmp_path / "turned", digits=DIGITS[::-1])
    data = open_data(settings(turned, derive={"parity": by_name}), ["parity"])
    assert labels_seen(data, "train", "parity")[0] == 1  # class 0 is "three" there


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a class that is not mapped": (
        {"from": "digit", "map": {"0": 0, "1": 1}},
        r"data.derive.new.map: expected a class or null for every class of digit, found none for two, three. "
        "Write null where",
    ),
    "a class that is not there": (
        {"from": "digit", "map": {"0": 0, "1": 1, "2": 0, "tree": 1}},
        "expected classes of digit, found 'tree'. Did you mean three",
    ),
    "a class as name and as index": (
        {"from": "digit", "map": {"0": 0, "zero": 1, "1": 1, "2": 0, "3": 1}},
        "expected each class of digit once",
    ),
    "an index beyond the names": (
        PARITY | {"map": {"0": 0, "1": 1, "2": 0, "3": 2}},
        r"data.derive.new.map.3: expected an index up to 1 \(even, odd\), found 2",
    ),
    "a misspelt new class": (
        PARITY | {"map": {"0": "even", "1": "odd", "2": "even", "3": "od"}},
        "found 'od'. Did you mean odd",
    ),
    "a name without names": (SMALL | {"map": {"0": "a", "1": 1, "2": 0, "3": 1}}, "Name the new `classes`"),
    "a single class": (
        {"from": "digit", "map": {"0": 0, "1": 0, "2": 0, "3": 0}},
        "expected two or more new",
    ),
    "another kind": (
        {"from": "value", "map": {"0": 1}},
        "expected a task of classes, found value, a regr",
    ),
    "no such task": (PARITY | {"from": "digits"}, "found 'digits'. Did you mean digit"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_map_that_does_not_fit_is_refused_before_training(numbers: Path, what: str) -> None:
    derive, message = WRONG[what]
    with pytest.raises(UserError, match=message) as caught:
        open_data(settings(numbers, derive={"new": derive}), ["value"])
    assert "\n" not in str(caught.value)


def test_a_derived_task_needs_a_name_of_its_own(numbers: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.derive.digit: expected a name of its own, found that of a task"
    ):
        open_data(settings(numbers, derive={"digit": PARITY}), ["digit"])


# ---------------------------------------------------------------- bins and functions
def tens(value: float) -> str | None:
    return None if value < 3 else "few" if value < 10 else "many"


def shape_of(name: str) -> str | None:
    return None if name == "zero" else "round" if name == "three" else "straight"


def wrong(value: float) -> float:
    return value / 2


def failing(value: float) -> int:
    raise KeyError("sad")


BINS = {"from": "value", "bins": [10, 20]}
TENS = {"from": "value", "by": f"{__name__}.tens", "classes": ["few", "many"]}


@pytest.mark.parametrize("image_size", [8, 16], ids=["small samples", "one by one"])
def test_numbers_become_classes_by_bins_and_by_a_function_of_ones_own(numbers: Path, image_size: int) -> None:
    data = open_data(
        settings(numbers, derive={"size": BINS, "tens": TENS}, image_size=image_size),
        ["size", "tens", "digit"],
    )
    for split, of_split in (("train", range(24)), ("val", range(24, 32))):
        assert labels_seen(data, split, "size") == {n: min(n // 10, 2) for n in of_split}
        expected = {n: None if n < 3 else int(n >= 10) for n in of_split}
        assert labels_seen(data, split, "tens") == expected
    size, of_tens = data.task_infos["size"], data.task_infos["tens"]
    assert (size.classes, size.class_counts) == (("below 10", "10 to 20", "from 20"), (10, 10, 4))
    assert (size.num_labelled, of_tens.class_counts, of_tens.num_labelled) == (24, (7, 14), 21)


def test_an_edge_belongs_to_the_bin_above_it_and_bins_may_have_names(numbers: Path) -> None:
    named = {"from": "value", "bins": [4, 5.5], "classes": ["low", "middle", "high"]}
    data = open_data(settings(numbers, derive={"size": named}), ["size"])
    seen = labels_seen(data, "train", "size")
    assert [seen[n] for n in (3, 4, 5, 6)] == [0, 1, 1, 2]
    assert data.task_infos["size"].classes == ("low", "middle", "high")


def test_classes_are_derived_by_a_function_of_their_names(numbers: Path) -> None:
    derive = {"shape": {"from": "digit", "by": f"{__name__}.shape_of"}}
    data = open_data(settings(numbers, derive=derive), ["shape"])
    assert data.task_infos["shape"].classes == ("straight", "round")
    expected = {None: None, 0: None, 1: 0, 2: 0, 3: 1}
    assert labels_seen(data, "train", "shape") == {n: expected[digit_of(n)] for n in range(24)}


def test_classes_made_of_numbers_can_be_balanced(numbers: Path) -> None:
    options = {"sampling": {"kind": "class_balanced", "task": "tens"}}
    data = open_data(settings(numbers, derive={"tens": TENS}, **options), ["tens"])
    assert set(labels_seen(data, "train", "tens").values()) == {0, 1}


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (
            {"from": "digit", "bins": [1]},
            r"derive.new.from: expected a task of numbers, found digit, a class",
        ),
        (
            {"from": "value", "by": f"{__name__}.tens"},
            r"derive.new.classes: expected the classes that .*tens makes",
        ),
        (
            {"from": "value", "by": f"{__name__}.tenz"},
            r"derive.new.by: expected a function tenz .*Did you mean tens",
        ),
        (
            {"from": "value", "by": f"{__name__}.wrong", "classes": ["a", "b"]},
            r"derive.new.by: expected a class, its index or None of .*wrong\(0.0\), found 0.0",
        ),
        (
            {"from": "value", "by": f"{__name__}.failing", "classes": ["a", "b"]},
            r"derive.new.by: .*failing\(0.0\) fails: KeyError: 'sad'",
        ),
        (
            {"from": "value", "by": f"{__name__}.tens", "classes": ["few", "lots"]},
            r"tens\(10.0\): expected an index, a new class or null, found 'many'",
        ),
    ],
)
def test_a_number_that_gets_no_class_is_refused(numbers: Path, wish: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_data(settings(numbers, derive={"new": wish}), ["new"])


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({}, "expected one of map, bins and by, found none"),
        ({"bins": [1], "map": {"0": 1}}, "expected one of map, bins and by, found map and bins"),
        ({"bins": [2, 1]}, "bins: expected ascending edges"),
        ({"bins": [2], "classes": ["a", "b", "c"]}, "classes: expected 2 for 1 edges, found 3"),
    ],
)
def test_a_derivation_that_says_too_little_or_too_much_is_refused(
    numbers: Path, wish: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(numbers, derive={"new": {"from": "value", **wish}})


# ---------------------------------------------------------------- functions of the image
def light(image: np.ndarray) -> str | None:
    """The pictures are as grey as their number says."""
    assert image.shape == (8, 8, 1) and image.dtype == np.uint8
    return None if image.max() == 3 else "bright" if image.mean() > 9.5 else "dark"


LIGHT = {"from": "image", "by": f"{__name__}.light", "classes": ["dark", "bright"]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mtl_dist" / "derived"


def light_of(numbers: range) -> dict[int, int | None]:
    return {n: None if n == 3 else int(n >= 10) for n in numbers}


@pytest.mark.parametrize("options", [{}, {"image_size": 16}, {"augment": "strong"}], ids=str)
def test_images_become_classes_by_a_function_of_the_stored_image(
    numbers: Path, cache: Path, options: dict[str, Any]
) -> None:
    data = open_data(settings(numbers, derive={"light": LIGHT}, **options), ["light", "digit"])
    if "augment" not in options:
        assert labels_seen(data, "train", "light") == light_of(range(24))
    assert labels_seen(data, "val", "light") == light_of(range(24, 32))
    assert data.task_infos["light"].class_counts == (9, 14)
    assert data.task_infos["light"].num_labelled == 23
    (train,) = data.sources["train"]
    assert train.facts.labels("light").missing == 1


def test_classes_of_images_can_be_balanced_and_go_to_workers(numbers: Path, cache: Path) -> None:
    options = {"sampling": {"kind": "class_balanced", "task": "light"}}
    data = open_data(settings(numbers, derive={"light": LIGHT}, **options), ["light"])
    assert set(labels_seen(data, "train", "light").values()) == {0, 1}
    (source,) = data.sources["train"]
    sent = pickle.loads(pickle.dumps(source.reader))
    seen = {int(sample.key[1:]): sample.labels.get("light") for sample in map(sent.read, range(24))}
    assert seen == light_of(range(24))


def test_images_are_looked_through_once_and_again_where_something_else_was_said(
    numbers: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = tmp_path / "lights_of_mine.py"
    monkeypatch.syspath_prepend(tmp_path)

    def counts_with(edge: int) -> tuple[int, ...]:
        module.write_text(f"def light(image):\n    return int(image.mean() >= {edge})\n")
        sys.modules.pop("lights_of_mine", None)
        importlib.invalidate_caches()
        derive = {"light": {"from": "image", "by": "lights_of_mine.light", "classes": ["low", "high"]}}
        caplog.clear()
        return open_data(settings(numbers, derive=derive), ["light"]).task_infos["light"].class_counts

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert counts_with(4) == (4, 20)
    assert "for the classes of 24 images, once" in caplog.text
    assert counts_with(4) == (4, 20) and not caplog.text
    for kept in cache.glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:-30])
    assert counts_with(4) == (4, 20) and "24 images" in caplog.text  # what was kept is damaged
    assert counts_with(5) == (5, 19) and "24 images" in caplog.text


def test_a_cache_that_cannot_be_written_is_said_and_does_without(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = open_data(settings(numbers, derive={"light": LIGHT}), ["light"])
    assert data.task_infos["light"].class_counts == (9, 14)
    assert "expected to keep the classes there, found: Not a directory" in caplog.text


def test_a_run_knows_that_its_function_says_something_else_now(
    numbers: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def facts() -> Identities:
        return identities(open_data(settings(numbers, derive={"light": LIGHT}), ["light"]))

    before = facts()
    assert not list(source_differences(before, facts(), "train"))
    turned = {n: c for n, c in enumerate(["dark", "bright"] * 12)}
    monkeypatch.setitem(globals(), "light", lambda image: turned[int(image.max()) % 24])
    for kept in cache.iterdir():
        kept.unlink()
    (line,) = source_differences(before, facts(), "train")
    assert "expected the same classes derived from the images, found others" in line


def crooked(image: np.ndarray) -> float:
    return float(image.mean())


def test_what_is_no_class_of_an_image_is_refused_by_the_name_of_the_sample(
    numbers: Path, cache: Path
) -> None:
    derive = {"light": LIGHT | {"by": f"{__name__}.crooked"}}
    with pytest.raises(UserError, match=r"crooked\(.*sample n0(\d\d)\), found \d+.0.$") as caught:
        open_data(settings(numbers, derive=derive), ["light"])
    assert "\n" not in str(caught.value)
    assert open_data(settings(numbers, derive=derive), ["digit"]), "it is not learnt, and not asked"


@pytest.mark.parametrize("wish", [{"map": {"0": 1}}, {"bins": [1]}, {"by": f"{__name__}.light"}], ids=str)
def test_images_need_a_function_and_classes(numbers: Path, wish: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected `by` and `classes` for classes of images, found"):
        settings(numbers, derive={"new": {"from": "image", **wish}})


# ---------------------------------------------------------------- recipes
def recipe_file(directory: Path, numbers: Path, tasks: str = "") -> Path:
    path = directory / "recipe.yaml"
    path.write_text(
        f"""{tasks}
data:
  train: [{{path: {numbers}}}]
  image_size: 8
  derive:
    small: {{from: digit, map: {{0: 2, 1: 0, 2: null, 3: null}}}}
model: {{backbone: simple_cnn}}
"""
    )
    return path


def test_a_recipe_with_a_derived_task_reads_back_as_it_was_written(numbers: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, numbers, "tasks: {small: {kind: classification}}")
    recipe = load_recipe(path, ["data.derive.small.map.3=1"])
    assert recipe.data.derive["small"].source == "digit"
    assert recipe.data.derive["small"].map == {"0": 2, "1": 0, "2": None, "3": 1}
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe))
    assert load_settings(Recipe, again) == recipe


def test_a_recipe_without_tasks_learns_every_task_of_the_data(numbers: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, numbers))
    assert {name: (task.kind, task.loss.kind, task.weight) for name, task in recipe.tasks.items()} == {
        "digit": ("classification", "cross_entropy", 1.0),
        "value": ("regression", "mse", 1.0),
        "small": ("classification", "cross_entropy", 1.0),
    }
    assert "cross_entropy" in to_yaml(recipe)


def test_a_recipe_without_tasks_is_checked_against_those_of_the_data(numbers: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, numbers)
    assert load_recipe(path, ["monitor.metric=val/small/accuracy"]).monitor.metric == "val/small/accuracy"
    with pytest.raises(UserError, match=r"monitor.metric: expected a metric .* found 'val/smal/"):
        load_recipe(path, ["monitor.metric=val/smal/accuracy"])
    with pytest.raises(UserError, match=r"optim.task_lr.other: expected one of the tasks"):
        load_recipe(path, ["optim.task_lr.other=1e-3"])


def test_a_recipe_whose_last_task_is_taken_out_is_refused(numbers: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, numbers, "tasks: {digit: {kind: classification}}")
    with pytest.raises(UserError, match="expected at least one task, found none"):
        load_recipe(path, ["tasks.digit=null"])


def test_a_recipe_without_tasks_says_when_its_data_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a prepared dataset, found no such directory"):
        load_recipe(recipe_file(tmp_path, tmp_path / "nowhere"))
