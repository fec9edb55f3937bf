"""The road that all importers share: whose splits, which groups, what became of everything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_dist.data.manifest import read_manifest
from mtl_dist.errors import UserError
from mtl_dist.importers import run
from mtl_dist.importers.account import Account
from mtl_dist.importers.groups import split_groups
from mtl_dist.importers.importer import Importer, LeftOut
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.splitting import split_names
from tests.source_files import HERE, fill, labels, picture, prepare, prepare_folders, prepared, read_back


class Made(Importer):
    """Pictures made here: of as many kinds, splits and groups as are asked for."""

    def __init__(self, count: int = 20, splits: str = "", per_group: int = 0, repeat: bool = False) -> None:
        self.count, self.splits, self.per_group, self.repeat = count, splits.split(), per_group, repeat

    def tasks(self) -> Mapping[str, TaskSource]:
        return {"kind": TaskSource("classification", ("a", "b"))}

    def records(self) -> Iterator[Record]:
        for number in range(self.count):
            split = self.splits[number % len(self.splits)] if self.splits else ""
            group = f"g{number // self.per_group}" if self.per_group else ""
            key = "same" if self.repeat else f"made_{number}"
            yield Record(key, picture(number), {"kind": number % 2}, split=split, group=group)


class Broken(Made):
    """One record of three cannot be used."""

    def records(self) -> Iterator[Record | LeftOut]:  # type: ignore[override]
        for number, record in enumerate(super().records()):
            yield LeftOut(f"scan {number} is empty.") if number % 3 == 0 else record


def sizes(out: Path) -> dict[str, int]:
    return {name: split.num_samples for name, split in read_manifest(out).splits.items()}


# ---------------------------------------------------------------- whose splits
@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("fit hold", {"fit": "train", "hold": "test"}),
        ("training development hold-out", {"training": "train", "development": "val", "hold-out": "test"}),
        ("train eval", {"train": "train", "eval": "val"}),
        ("train val eval", {"train": "train", "val": "val", "eval": "test"}),
        ("train fold3", {"train": "train", "fold3": "fold3"}),
    ],
)
def test_splits_are_known_by_their_usual_names(words: str, meant: dict[str, str]) -> None:
    assert split_names(words.split()) == meant


def test_a_split_that_the_data_brings_is_used_as_it_is_and_never_mixed(tmp_path: Path) -> None:
    manifest = prepared(Made, tmp_path / "out", splits="fit hold")
    assert sizes(tmp_path / "out") == {"train": 10, "test": 10}
    assert "splits by their names: fit = train, hold = test" in manifest.notes
    with pytest.raises(UserError, match=r"--split: expected data without splits, found fit, hold\. .* drop"):
        prepared(Made, tmp_path / "new", splits="fit hold", split=(0.8, 0.2))
    prepared(Made, tmp_path / "held", splits="fit hold", val=0.2)
    assert sizes(tmp_path / "held") == {"train": 8, "val": 2, "test": 10}


def test_data_with_splits_for_some_samples_alone_is_refused(tmp_path: Path) -> None:
    class Half(Made):
        def records(self) -> Iterator[Record]:
            for number, record in enumerate(super().records()):
                yield Record(record.key, record.image, record.labels, split="train" if number else "")

    with pytest.raises(UserError, match=r"expected one for every sample, .*, found none for 1 \(made_0\)"):
        from mtl_dist.importers.road import prepare as prepare_from

        prepare_from(Half(), tmp_path / "out", HERE)
    assert list(tmp_path.iterdir()) == []


def test_splits_may_stand_below_the_classes(tmp_path: Path) -> None:
    files = {
        f"{name}/{split}/{n}.jpg": picture(100 * len(name) + n + 50 * (split == "test"))
        for name in ("ant", "bees")
        for split, count in (("train", 6), ("test", 4))
        for n in range(count)
    }
    prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "kind", val=0.2)
    assert sizes(tmp_path / "out") == {"train": 10, "val": 2, "test": 8}
    assert read_manifest(tmp_path / "out").tasks["kind"].classes == ("ant", "bees")


# ---------------------------------------------------------------- groups
def test_groups_are_whole_and_classes_balanced() -> None:
    groups = [f"s{i // 5}" for i in range(200)]
    strata = [(i // 5) % 2 for i in range(200)]
    splits = split_groups(groups, strata, (0.8, 0.1, 0.1), seed=0)
    assert len(set(zip(groups, splits, strict=True))) == 40
    assert Counter(splits) == {"train": 160, "val": 20, "test": 20}
    assert Counter(zip(splits, strata, strict=True))["val", 0] == 10


def test_every_split_has_a_group_where_there_are_enough() -> None:
    groups = ["big"] * 50 + ["b"] * 3 + ["c"] * 2
    assert Counter(split_groups(groups, [0] * 55, (0.8, 0.1, 0.1), 0)).keys() == {"train", "val", "test"}


def slides(root: Path) -> Path:
    rows = [f"s{i // 5}_{i % 5}.jpg,{['healthy', 'infected'][(i // 5) % 2]},slide{i // 5}" for i in range(40)]
    return fill(
        root,
        {"labels.csv": "file,dx,slide\n" + "\n".join(rows) + "\n"}
        | {f"s{i // 5}_{i % 5}.jpg": picture(i) for i in range(40)},
    )


@pytest.mark.parametrize("group", ["slide", "{group}_*"])
def test_a_column_or_a_pattern_of_names_keeps_groups_together(tmp_path: Path, group: str) -> None:
    manifest = prepare(slides(tmp_path / "src"), tmp_path / "out", classification={"dx": "dx"}, group=group)
    found = {
        split: {sample["__key__"].partition("_")[0] for sample in read_back(tmp_path / "out", split)}
        for split in manifest.splits
    }
    assert sorted(len(names) for names in found.values()) == [1, 1, 6]
    assert sum(len(names) for names in found.values()) == len(set.union(*found.values())) == 8
    assert "groups: 1 in test, 6 in train, 1 in val" in manifest.notes


def test_of_one_group_nothing_is_held_out_and_that_is_said(tmp_path: Path) -> None:
    settings = {"splits": "train " * 10 + "test " * 10, "per_group": 10}
    manifest = run(Made, tmp_path, settings, PackOptions(val=0.5))
    assert manifest.splits.keys() == {"train", "test"}
    assert "nothing of train held out as val: train is one group, and groups stay whole" in manifest.notes


def test_a_column_and_names_that_look_like_groups_are_noted(tmp_path: Path) -> None:
    manifest = prepare(slides(tmp_path / "src"), tmp_path / "out", classification={"dx": "dx"})
    assert any(note.startswith("column slide looks like a group: 8 values") for note in manifest.notes)
    assert any(
        note.startswith("names look like groups: 8 beginnings such as 's0'") for note in manifest.notes
    )


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("p{group:02d}_{number}", "--group '{group}_*'"),
        ("p{group:02d}-{number}", "--group '{group}-*'"),
        ("slide_{group:02d}_{number}", "--group 'slide_{group}_*'"),
        ("x{group}_jpg.rf.{number:032x}", "--group '{group}.rf.*'"),
        ("{side}_{group}_{number}", "A column of them in a table, for --group COLUMN,"),
    ],
)
def test_the_note_on_names_that_look_like_groups_says_what_keeps_these_together(
    tmp_path: Path, name: str, option: str
) -> None:
    files: dict[str, bytes] = {}
    for number in range(24):  # each group is in both classes
        group = number // 4
        stem = name.format(side="lr"[group % 2], group=group, number=number % 4)
        files[f"{'ab'[number % 2]}/{stem}.jpg"] = picture(number)
    src = fill(tmp_path / "in", files)
    manifest = prepare_folders(src, tmp_path / "out", task="c")
    (note,) = [note for note in manifest.notes if note.startswith("names look like groups: 6 beginnings")]
    assert f". {option} keeps them together" in note
    if option.startswith("--group"):
        manifest = prepare_folders(src, tmp_path / "grouped", task="c", group=option.split("'")[1])
        assert "groups: 1 in test, 4 in train, 1 in val" in manifest.notes


def test_a_group_that_the_datas_own_splits_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"group g0: expected all of it in one split, found train .* and test"
    ):
        prepared(Made, tmp_path / "out", splits="train test", per_group=4)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("word", "advice"),
    [("trian", "Did you mean 'train'?"), ("vall", "Did you mean 'val'?"), ("qqq", "Correct it.")],
)
def test_a_word_that_is_no_split_is_refused_where_groups_are_told_theirs(
    tmp_path: Path, word: str, advice: str, listed: bool
) -> None:
    split = f"{word}=g1;test=g3"
    if listed:
        split = str(tmp_path / "splits.csv")
        Path(split).write_text(f"group,split\ng1,{word}\ng3,test\n")
    with pytest.raises(UserError) as refused:
        prepared(Made, tmp_path / "out", per_group=5, split=split)
    assert str(refused.value) == (f"--split, group g1: expected train, val or test, found {word!r}. {advice}")


def test_groups_that_are_told_their_splits_need_group(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"since it names g1; g3, found none\. .*add --group COLUMN"):
        prepared(Made, tmp_path / "out", split="val=g1;test=g3")


def test_groups_go_where_they_are_told(tmp_path: Path) -> None:
    prepared(Made, tmp_path / "out", per_group=5, split="val=g1;test=g3")
    assert sizes(tmp_path / "out") == {"train": 10, "val": 5, "test": 5}


# ---------------------------------------------------------------- what became of everything
def test_records_that_cannot_be_used_are_left_out_if_so_many_may_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scan 0 is empty"):
        prepared(Broken, tmp_path / "out")
    prepared(Broken, tmp_path / "out", max_skipped=7)
    assert sum(sizes(tmp_path / "out").values()) == 13


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected each key once, found 'same' twice"):
        prepared(Made, tmp_path / "out", repeat=True)


def test_a_thing_without_a_fate_is_an_error_with_its_name() -> None:
    account = Account()
    account.found("files", ["a", "b"])
    account.became("files", "a", "image")
    with pytest.raises(UserError, match=r"account of files: expected each of 2 .*, found 1 .* \(b\)"):
        account.totals()


def test_links_to_folders_are_followed_and_loops_are_found(tmp_path: Path) -> None:
    files = {
        f"{s}/{c}/{n}.jpg": picture(hash((s, c, n)) % 999)
        for s in ("train", "val")
        for c in "ab"
        for n in "01"
    }
    src = fill(tmp_path / "src", files)
    os.symlink("val", src / "test")
    os.symlink("..", src / "train" / "a" / "loop")
    manifest = prepare_folders(src, tmp_path / "out", "kind")
    assert sizes(tmp_path / "out") == {"train": 4, "val": 4, "test": 4}
    assert any("the same image in val and test: 4" in note for note in manifest.notes)
    assert manifest.account["files"]["left out: a link to a folder above it"] == 1


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    files = {
        f"{name}/{n}.jpg": picture(10 * k + n)
        for k, name in enumerate(("caf\u00e9", "cafe\u0301", "tea"))
        for n in range(5)
    }
    manifest = prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "drink", (0.8, 0.2))
    assert manifest.tasks["drink"].classes == ("caf\u00e9", "tea")
    assert Counter(label["drink"] for label in labels(tmp_path / "out").values()) == {0: 10, 1: 5}
    assert r"drink: texts that are one class, 'café': 'cafe\u0301' (5), 'caf\xe9' (5)" in manifest.notes


def test_levels_of_folders_are_tasks_and_are_not_passed_over(tmp_path: Path) -> None:
    names = ("fish/pike", "fish/other", "bird/crow", "bird/other")
    files = {f"{name}/{n}.jpg": picture(10 * k + n) for k, name in enumerate(names) for n in range(5)}
    src = fill(tmp_path / "src", files)
    with pytest.raises(UserError, match=r"expected 1 folder\(s\) of classes .*--levels t,TASK"):
        prepare_folders(src, tmp_path / "out", "t")
    manifest = prepared("folders", tmp_path / "out", source=src, levels=["order", "species"])
    assert manifest.tasks["order"].classes == ("bird", "fish")
    assert manifest.tasks["species"].classes == ("bird/other", "crow", "fish/other", "pike")
    manifest = prepared("folders", tmp_path / "one", source=src, levels=["order", "-"])
    assert list(manifest.tasks) == ["order"]


FILES = st.sampled_from(
    ["0.jpg", "1.JPG", "2.jpeg", "._0.jpg", ".DS_Store", "readme.txt", "noextension", "3.png"]
)
CLASSES = st.sampled_from(
    ["a", "b", "B", "caf\u00e9", "cafe\u0301", "x y", "1", ".hidden", "__MACOSX", "\u00fc" * 60]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.tuples(CLASSES, FILES), min_size=1, max_size=25), st.integers(0, 2))
def test_samples_and_what_is_left_out_are_all_that_is_there(
    tmp_path: Path, tree: set[tuple[str, str]], links: int
) -> None:
    root = Path(str(tmp_path / str(len(list(tmp_path.iterdir())))))
    src = fill(root / "src", {f"{c}/{name}": picture(1) for c, name in sorted(tree)})
    for number in range(links):
        os.symlink(src, src / sorted(tree)[0][0] / f"loop{number}")
    there = sum(len(files) for _, _, files in os.walk(src)) + links
    try:
        manifest = prepare_folders(src, root / "out", "kind", (0.5, 0.5))
    except UserError:
        return  # too few classes or samples: nothing was made
    counts = manifest.account["files"]
    assert sum(counts.values()) == there
    samples = sum(split.num_samples for split in manifest.splits.values())
    assert counts["image"] == samples == len(labels(root / "out"))
    forms = {
        unicodedata.normalize("NFC", c) for c, n in tree if c[0] != "." and c != "__MACOSX" and _image(n)
    }
    assert set(manifest.tasks["kind"].classes) == forms


def _image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith((".jpg", ".jpeg", ".png"))


# ---------------------------------------------------------------- memory
PEAK = """
import io, resource, sys
import numpy as np
from mtl_dist.importers import run
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions


class Large(Importer):
    verify = False

    def __init__(self, count: int) -> None:
        self.count = count

    def tasks(self):
        return {"n": TaskSource("regression")}

    def records(self):
        buffer = io.BytesIO()
        np.save(buffer, np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8))
        for number in range(self.count):
            yield Record(f"n{number}", buffer.getvalue()[:-4] + number.to_bytes(4, "big"), {"n": number})


def main(out, count):
    run(Large, out, {"count": int(count)}, PackOptions(workers=1))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """100 images of 3 MB take at most 100 MB more than 20 do: where they are kept it is 240 MB."""
    (tmp_path / "large.py").write_text(PEAK)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    peaks = []
    for count in ("20", "100"):
        code = f"import large; large.main('out{count}', {count})"
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(result.stdout))
        shutil.rmtree(tmp_path / f"out{count}")
    assert peaks[1] - peaks[0] < 100


def test_the_same_importer_by_its_path_and_by_its_class(tmp_path: Path) -> None:
    run(Made, tmp_path / "one", {"count": 8}, PackOptions(workers=1))
    run("tests.unit.importers.test_road.Made", tmp_path / "two", {"count": 8}, PackOptions(workers=1))
    assert labels(tmp_path / "one") == labels(tmp_path / "two")
