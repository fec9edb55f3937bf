"""A split that the data brings is found by whatever name, in whatever column, else asked for; never mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_dist.data.manifest import read_manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.folders import Folders
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.road import prepare
from mtl_dist.importers.split_columns import check_folds, split_column, split_words
from mtl_dist.importers.splitting import is_split_word, split_names, splits_of_folders
from mtl_dist.importers.table import TableImporter
from tests.source_files import fill, picture

HERE = PackOptions(workers=1)


def sizes(directory: Path) -> dict[str, int]:
    return {name: split.num_samples for name, split in read_manifest(directory).splits.items()}


def table(
    tmp_path: Path, column: str, words: list[str], **options: object
) -> tuple[dict[str, int], list[str]]:
    rows = [f"{n}.jpg,{'ab'[n % 2]},{word}" for n, word in enumerate(words)]
    files = {f"{n}.jpg": picture(n) for n in range(len(words))}
    src = fill(tmp_path / "src", {**files, "t.csv": f"file,dx,{column}\n{chr(10).join(rows)}\n".encode()})
    importer = TableImporter(src / "t.csv", labels={"dx": "classification:dx"})
    manifest = prepare(importer, tmp_path / "out", PackOptions(workers=1, **options))  # type: ignore[arg-type]
    return sizes(tmp_path / "out"), list(manifest.notes)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("train2017 val2017", {"train2017": "train", "val2017": "val"}),
        ("train_images test_images", {"train_images": "train", "test_images": "test"}),
        ("Training_set Test_set", {"Training_set": "train", "Test_set": "test"}),
        ("development holdout", {"development": "train", "holdout": "test"}),
        ("train development", {"train": "train", "development": "val"}),
        (
            "Training PublicTest PrivateTest",
            {"Training": "train", "PublicTest": "val", "PrivateTest": "test"},
        ),
    ],
)
def test_words_for_splits_may_have_a_year_or_images_with_them(words: str, meant: dict[str, str]) -> None:
    assert split_names(words.split()) == meant


@pytest.mark.parametrize("word", ["trainer", "testimony", "value", "images", "set", "train1", "pretrain", ""])
def test_other_words_are_no_splits(word: str) -> None:
    assert not is_split_word(word)


@pytest.mark.parametrize(
    ("column", "words", "found"),
    [
        ("cohort", "train train val test", {"train": 2, "val": 1, "test": 1}),
        ("is_train", "1 1 0 1", {"train": 3, "test": 1}),
        ("is_test", "False True False True", {"train": 2, "test": 2}),
        ("Usage", "Training Training PublicTest PrivateTest", {"train": 2, "val": 1, "test": 1}),
    ],
)
def test_a_column_that_says_splits_is_used_whatever_it_is_called(
    tmp_path: Path, column: str, words: str, found: dict[str, int]
) -> None:
    made, notes = table(tmp_path, column, words.split())
    assert made == found
    assert f"splits taken from the column '{column}'" in notes


def test_folds_are_asked_for_and_never_mixed_unsaid(tmp_path: Path) -> None:
    folds = [str(n % 3) for n in range(12)]
    with pytest.raises(
        UserError, match=r"column fold: .* folds are held out, found 0, 1, 2\. .*--group fold"
    ):
        table(tmp_path, "fold", folds)
    made, _ = table(tmp_path, "fold", folds, group="fold", split="val=1;test=2")
    assert made == {"train": 4, "val": 4, "test": 4}
    assert sum(table(tmp_path / "new", "fold", folds, split="0.8,0.2")[0].values()) == 12


def test_numbers_are_no_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a word for a split \(train, val, test\), found '0'"):
        table(tmp_path, "split", ["0", "1", "2", "0"])


def test_a_column_that_may_mean_val_or_sound_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"column is_valid: .*--split is_valid"):
        table(tmp_path, "is_valid", ["True", "False", "False", "True"])
    assert table(tmp_path, "is_valid", ["True", "False", "False", "True"], split="is_valid")[0] == {
        "train": 2,
        "val": 2,
    }


def test_two_columns_that_say_different_splits_are_refused() -> None:
    columns = {"a": ["train", "test"], "b": ["train", "test"]}
    assert split_column(columns) == "a"
    with pytest.raises(UserError, match="one column of them, found a and b, which differ"):
        split_column({**columns, "b": ["test", "train"]})


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("test", ["0", "1"]),  # a test's outcome
        ("exam", ["test", "val"]),
        ("valid", ["1", "0"]),
        ("dx", ["train", "boat"]),
        ("is_train", ["1", "1"]),
    ],
)
def test_columns_of_other_things_say_no_splits(name: str, cells: list[str]) -> None:
    assert split_column({name: cells}) == ""
    check_folds({name: cells, "folded": ["0", "1"]})


def test_what_is_not_for_training_is_for_testing() -> None:
    assert split_words("is_train", ["yes", "no"]) == ["train", "test"]
    assert split_words("is_val", ["0", "1.0"]) == ["train", "val"]


def test_one_folder_of_everything_is_a_split_only_by_its_bare_name() -> None:
    assert splits_of_folders(["train_images/a.png", "train_images/b.png"]) == ["", ""]
    assert splits_of_folders(["train/a.png", "train/b.png"]) == ["train", "train"]
    assert splits_of_folders(["x/train2017/a.png", "x/val2017/b.png"]) == ["train2017", "val2017"]
    assert splits_of_folders(["train/a.png", "test/b.png", "c.png"]) == ["train", "test", ""]


def folders(tmp_path: Path, names: list[str], **settings: object) -> tuple[dict[str, int], list[str]]:
    files = {f"{name}/{n}.jpg": picture(10 * k + n) for k, name in enumerate(names) for n in range(2)}
    src = fill(tmp_path / "src", files)
    manifest = prepare(Folders(src, **{"task": "t", **settings}), tmp_path / "out", HERE)  # type: ignore[arg-type]
    return sizes(tmp_path / "out"), list(manifest.notes)


def test_folders_of_splits_may_have_a_year_or_images_with_them(tmp_path: Path) -> None:
    made, notes = folders(tmp_path, ["train2017/a", "train2017/b", "val2017/a", "val2017/b"])
    assert made == {"train": 4, "val": 4}
    assert "splits by their names: train2017 = train, val2017 = val" in notes


def test_a_class_called_test_beside_others_is_a_class(tmp_path: Path) -> None:
    _, notes = folders(tmp_path, ["control", "test"])
    assert "taken for classes, since no folder is called train: test" in notes
    assert read_manifest(tmp_path / "out").tasks["t"].classes == ("control", "test")


def test_folders_that_may_be_splits_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"If check, learn are splits, name them: --levels -,TASK --group"):
        folders(tmp_path, ["learn/a", "learn/b", "check/a", "check/b"])


def test_a_level_that_says_nothing_renames_no_class(tmp_path: Path) -> None:
    made, notes = folders(tmp_path, ["x/a", "x/b", "y/a", "y/b"], task="", levels=("-", "kind"))
    assert sum(made.values()) == 8
    assert read_manifest(tmp_path / "out").tasks["kind"].classes == ("a", "b")
    assert not [note for note in notes if "several folders" in note]


def test_folders_whose_names_differ_in_space_alone_are_one_class_with_counts(tmp_path: Path) -> None:
    _, notes = folders(tmp_path, ["ant", "ant ", "\ufeffant", "bee"])
    assert read_manifest(tmp_path / "out").tasks["t"].classes == ("ant", "bee")
    assert r"t: texts that are one class, 'ant': 'ant' (2), 'ant ' (2), '\ufeffant' (2)" in notes
