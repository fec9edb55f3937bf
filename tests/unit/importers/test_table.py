"""Tables of labels become a dataset; what is missing or strange in them is handled by rule."""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mtl_dist.data.manifest import read_manifest
from mtl_dist.durable import sha256_of
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.table import TableImporter
from tests.source_files import (
    ALL,
    CSV,
    FILES,
    contents,
    encoded,
    fill,
    labels,
    mask,
    picture,
    prepare,
    read_back,
    skin,
)

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the optional data folder {DATA} is not there")


def by_key(directory: Path, split: str) -> dict[str, dict[str, Any]]:
    return {sample["__key__"]: sample for sample in read_back(directory, split)}


def test_a_table_becomes_labels_of_every_kind_and_empty_cells_are_missing(tmp_path: Path) -> None:
    manifest = prepare(skin(tmp_path / "skin") / "labels.csv", tmp_path / "out", **ALL)
    assert labels(tmp_path / "out") == {
        "a": {"diagnosis": 0, "age": 41.0, "tags": [0, 1]},
        "b": {"diagnosis": 1, "tags": [1]},
        "c": {"diagnosis": 0, "age": 7.0, "tags": []},
        "d": {"diagnosis": 1, "age": 60.0, "tags": [0]},
        "e": {},
    }
    samples = by_key(tmp_path / "out", "train")
    assert samples["a"]["png"] == FILES["a.png"]
    assert {key for key, sample in samples.items() if "lesion.png" in sample} == {"a", "c"}
    stored = np.asarray(Image.open(io.BytesIO(samples["a"]["lesion.png"])))
    assert stored.tolist() == [[1] * 10] * 3 + [[0] * 10] * 9
    assert manifest.name == "skin"
    tasks = manifest.tasks
    assert (tasks["diagnosis"].classes, tasks["diagnosis"].class_counts) == (("mel", "nv, common"), (2, 1))
    assert (tasks["age"].mean, tasks["age"].std, tasks["age"].unit) == (24.0, 17.0, "years")
    assert (tasks["age"].minimum, tasks["age"].maximum, tasks["age"].num_labelled) == (7.0, 41.0, 2)
    assert (tasks["tags"].classes, tasks["tags"].class_counts) == (("dark", "round"), (1, 2))
    assert (tasks["lesion"].classes, tasks["lesion"].class_counts) == (("background", "lesion"), (180, 60))
    counts = manifest.splits["val"].labels
    assert {task: (count.present, count.missing) for task, count in counts.items()} == {
        "diagnosis": (1, 1),
        "age": (1, 1),
        "tags": (1, 1),
        "lesion": (1, 1),
    }


@pytest.mark.parametrize(
    ("name", "table", "none", "number"),
    [
        ("t.csv", "file,colours\na.png,red|blue\nb.png,\nc.png,|\nd.png,NA\n", "'|' alone", 1),
        ("t.json", {"a.png": ["red", "blue"], "b.png": None, "c.png": [], "d.png": None}, "[]", 2),
    ],
)
def test_empty_cells_of_several_classes_are_told_from_none_of_them(
    tmp_path: Path, name: str, table: str | dict[str, Any], none: str, number: int
) -> None:
    pictures = {f"{letter}.png": picture(at) for at, letter in enumerate("abcd")}
    root = fill(tmp_path / "in", {name: table, **pictures})
    tasks = {"multilabel": {"colours": "colours" if name == "t.csv" else "label"}}
    manifest = prepare(root / name, tmp_path / "out", **tasks, split="0.5,0.5")
    assert labels(tmp_path / "out") == {"a": {"colours": [0, 1]}, "b": {}, "c": {"colours": []}, "d": {}}
    said = f"colours: empty cells, missing labels and not 'none of the classes', which is {none}: {number}"
    assert said in manifest.notes


def test_a_full_column_and_labels_of_one_class_say_nothing_of_empty_cells(tmp_path: Path) -> None:
    rows = "file,tags,dx\na.png,x|y,cat\nb.png,|,\n"
    root = fill(tmp_path / "in", {"t.csv": rows, "a.png": picture(1), "b.png": picture(2)})
    tasks = {"multilabel": {"tags": "tags"}, "classification": {"dx": "dx"}}
    manifest = prepare(root / "t.csv", tmp_path / "out", **tasks, split="0.5,0.5")
    assert not any("empty cells" in note for note in manifest.notes)


def test_a_byte_order_mark_and_windows_lines_change_nothing(tmp_path: Path) -> None:
    odd = "\ufeff" + CSV.replace("\n", "\r\n") + "\r\n"
    for name, table in (("plain", CSV), ("odd", odd)):
        prepare(skin(tmp_path / "skin", table), tmp_path / name, **ALL)
    assert labels(tmp_path / "plain") == labels(tmp_path / "odd")
    assert read_manifest(tmp_path / "plain") == read_manifest(tmp_path / "odd")


@pytest.mark.parametrize(("separator", "said"), [(";", "semicolons"), ("\t", "tabs"), ("|", "pipes")])
def test_the_separator_of_columns_is_found_and_said(tmp_path: Path, separator: str, said: str) -> None:
    rows = [("file", "dx", "age"), ("a.png", "cat", "1,5"), ("b.png", "dog", "2,25")]
    text = "".join(f"{separator.join(row)}\n" for row in rows)
    root = fill(tmp_path / "in", {"t.csv": text, "a.png": picture(1), "b.png": picture(2)})
    tasks = {"classification": {"dx": "dx"}, "regression": {"age": "age"}}
    manifest = prepare(root / "t.csv", tmp_path / "out", **tasks, split="0.5,0.5")
    assert labels(tmp_path / "out") == {"a": {"dx": 0, "age": 1.5}, "b": {"dx": 1, "age": 2.25}}
    assert f"columns of t.csv are separated by {said}" in manifest.notes
    assert "age: numbers have a decimal comma" in manifest.notes


def test_images_may_be_named_without_their_extension(tmp_path: Path) -> None:
    files = {"t.csv": "id,dx\n1,cat\nx.2,dog\n", "p/1.png": picture(1), "p/x.2.png": picture(2)}
    root = fill(tmp_path / "in", {**files, "p/1.txt": "no image"})
    prepare(root / "t.csv", tmp_path / "out", image="id", classification={"dx": "dx"}, split="0.5,0.5")
    assert sorted(label["dx"] for label in labels(tmp_path / "out").values()) == [0, 1]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["a.png,cat", "b.png,dog", "c.png,", "gone.png,cat", ",", " , "])))
def test_every_row_is_a_sample_or_left_out_for_a_reason(lines: list[str]) -> None:
    rows = ["a.png,cat", *lines]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: picture(i) for i, name in enumerate(("a.png", "b.png", "c.png"))}
        root = fill(Path(folder), {"t.csv": "".join(f"{row}\n" for row in ("file,dx", *rows)), **files})
        importer = TableImporter(root / "t.csv", labels={"dx": "classification:dx"})
        importer.tasks()
        found = list(importer.records())
    there = {row for row in rows if row[:5] in files}
    fates = importer.account.totals()["rows"]
    assert fates.get("sample", 0) == len(there) == sum(isinstance(each, Record) for each in found)
    assert fates.get("left out: blank", 0) == sum(not row.replace(",", "").strip() for row in rows)
    assert fates.get("left out: its image is not there", 0) == rows.count("gone.png,cat")
    assert sum(fates.values()) == len(rows)


def test_json_says_the_same_as_csv(tmp_path: Path) -> None:
    rows = [
        {
            "file": "a.png",
            "split": "train",
            "dx": "mel",
            "age": 41,
            "tags": ["round", "dark"],
            "mask": "masks/a.png",
        },
        {"file": "b.png", "split": "train", "dx": "nv, common", "age": None, "tags": ["round"]},
        {"file": "c.png", "split": "train", "dx": "mel", "age": 7, "tags": [], "mask": "masks/c.png"},
        {
            "file": "d.png",
            "split": "val",
            "dx": "nv, common",
            "age": 60,
            "tags": ["dark"],
            "mask": "masks/d.png",
        },
        {"file": "e.png", "split": "val"},
    ]
    src = fill(skin(tmp_path / "skin"), {"rows.json": rows})
    prepare(src / "labels.csv", tmp_path / "csv", **ALL)
    prepare(src / "rows.json", tmp_path / "json", **ALL)
    for name in ("train-000000.tar", "val-000000.tar"):
        assert sha256_of(tmp_path / "csv" / name) == sha256_of(tmp_path / "json" / name)


def test_a_zip_and_a_directory_give_the_same_shards(tmp_path: Path) -> None:
    src = skin(tmp_path / "skin")
    with zipfile.ZipFile(tmp_path / "skin.zip", "w") as archive:
        for path in src.rglob("*.*"):
            archive.write(path, f"around/{path.relative_to(src)}")
    prepare(src, tmp_path / "one", **ALL)
    prepare(tmp_path / "skin.zip", tmp_path / "two", **ALL)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_paths_may_be_absolute_or_below_a_root(tmp_path: Path) -> None:
    pictures = fill(tmp_path / "pictures", {f"deep/{name}": data for name, data in FILES.items()})
    table = f"path,dx\n{pictures}/deep/a.png,x\ndeep/b.png,y\nc.png,x\n"
    src = fill(tmp_path / "tables", {"t.csv": table}) / "t.csv"
    arguments = {"image": "path", "root": pictures, "classification": {"dx": "dx"}, "split": (0.5, 0.5)}
    prepare(src, tmp_path / "out", **arguments)
    assert labels(tmp_path / "out") == {"a": {"dx": 0}, "b": {"dx": 1}, "c": {"dx": 0}}
    assert read_manifest(tmp_path / "out").name == "t"


LAYOUT: dict[str, Any] = {
    "labels.json": {"a.png": 1, "b.png": 0, "c.png": 1},
    "classes.json": ["benign", "malignant"],
    "splits.json": {"train": ["a.png", "b.png"], "val": ["c.png"]},
    "metadata.csv": "file,age\na.png,30\nc.png,50\nunknown.png,1\n",
    "images/train/a.png": FILES["a.png"],
    "images/train/b.png": FILES["b.png"],
    "images/val/c.png": FILES["c.png"],
    "masks/train/a.png": mask(200),
    "masks/val/c.png": mask(255),
}
LAYOUT_TASKS = {
    "classification": {"diagnosis": "label"},
    "regression": {"age": "age"},
    "segmentation": {"lesion": "masks"},
}


def test_labels_json_with_folders_of_images_and_masks_is_understood(tmp_path: Path) -> None:
    manifest = prepare(fill(tmp_path / "skin", LAYOUT), tmp_path / "out", **LAYOUT_TASKS)
    assert manifest.tasks["diagnosis"].classes == ("benign", "malignant")
    assert labels(tmp_path / "out") == {
        "a": {"diagnosis": 1, "age": 30.0},
        "b": {"diagnosis": 0},
        "c": {"diagnosis": 1, "age": 50.0},
    }
    assert {key: "lesion.png" in sample for key, sample in by_key(tmp_path / "out", "train").items()} == {
        "a": True,
        "b": False,
    }
    assert list(by_key(tmp_path / "out", "val")) == ["c"]


def test_without_splits_json_the_folders_of_the_images_decide(tmp_path: Path) -> None:
    layout = {name: content for name, content in LAYOUT.items() if name != "splits.json"}
    manifest = prepare(fill(tmp_path / "skin", layout), tmp_path / "out", **LAYOUT_TASKS)
    assert list(by_key(tmp_path / "out", "val")) == ["c"]
    assert manifest.notes == ("splits taken from the folders of the images",)


def test_class_names_may_stand_by_index_or_by_name(tmp_path: Path) -> None:
    for number, content in enumerate(({"0": "benign", "1": "malignant"}, {"malignant": 1, "benign": 0})):
        src = fill(tmp_path / f"skin{number}", {**LAYOUT, "classes.json": content})
        manifest = prepare(src, tmp_path / f"out{number}", **LAYOUT_TASKS)
        assert manifest.tasks["diagnosis"].classes == ("benign", "malignant")


def test_masks_of_the_same_stem_are_told_by_their_folder(tmp_path: Path) -> None:
    table = "file,dx\nimages/train/1.png,x\nimages/val/1.png,y\n"
    files = {f"images/{split}/1.png": picture(number) for number, split in enumerate(("train", "val"))}
    masks = {
        "masks/train/1.png": mask(255),
        "masks/val/1.png": encoded(Image.fromarray(np.full((12, 10), 255, np.uint8))),
    }
    src = fill(tmp_path / "src", {"labels.csv": table, **files, **masks})
    manifest = prepare(src, tmp_path / "out", segmentation={"m": "masks"})
    assert manifest.splits["train"].labels["m"].class_counts == (90, 30)
    assert manifest.splits["val"].labels["m"].class_counts == (0, 120)


def test_classes_are_names_or_values_as_given(tmp_path: Path) -> None:
    table = "file,split,grade\na.png,train,3\nb.png,train,1.0\nc.png,train,\nd.png,val,1\n"
    src = skin(tmp_path / "skin", table)
    prepare(src, tmp_path / "bare", classification={"grade": "grade"})
    assert read_manifest(tmp_path / "bare").tasks["grade"].classes == ("1", "3")
    assert labels(tmp_path / "bare") == {"a": {"grade": 1}, "b": {"grade": 0}, "c": {}, "d": {"grade": 0}}
    by_value = {"grade": {1: "low", 2: "middle", 3: "high"}}
    prepare(src, tmp_path / "named", classification={"grade": "grade"}, classes=by_value)
    assert read_manifest(tmp_path / "named").tasks["grade"].classes == ("low", "middle", "high")
    assert labels(tmp_path / "named")["a"] == {"grade": 2}


def test_the_values_of_masks_become_classes_by_the_given_table(tmp_path: Path) -> None:
    trimap = np.repeat(np.array([[1, 2, 3, 255]], np.uint8), 3, axis=0)
    files = {
        "a.png": picture(0, size=(4, 3)),
        "t/a.png": encoded(Image.fromarray(trimap)),
        "labels.csv": "file,split\na.png,train\n",
    }
    arguments = {
        "segmentation": {"trimap": "t"},
        "classes": {"trimap": {1: "animal", 2: "ground", 3: "border"}},
    }
    manifest = prepare(fill(tmp_path / "src", files), tmp_path / "out", **arguments)
    assert manifest.tasks["trimap"].classes == ("animal", "ground", "border")
    assert manifest.tasks["trimap"].class_counts == (3, 3, 3)


def test_rows_that_repeat_another_are_left_out_and_counted(tmp_path: Path) -> None:
    table = (
        CSV + "a.png,train,mel,41.0,round|dark,masks/a.png\n./a.png,train,mel,41.0,round|dark,masks/a.png\n"
    )
    manifest = prepare(skin(tmp_path / "skin", table), tmp_path / "out", **ALL)
    assert manifest.splits["train"].num_samples == 3
    assert manifest.notes[0].startswith("rows that repeat another, left out: 2 (")


def test_rows_without_their_image_are_skipped_up_to_a_bound(tmp_path: Path) -> None:
    src = skin(tmp_path / "skin", CSV + "gone.png,val,mel,1,,\n")
    with pytest.raises(UserError, match=r"line 7: expected the image 'gone\.png' in .*, found no such file"):
        prepare(src, tmp_path / "out", **ALL)
    manifest = prepare(src, tmp_path / "out", **ALL, options=PackOptions(workers=1, max_skipped=1))
    assert manifest.splits["val"].num_samples == 2
    assert manifest.notes[0].startswith("rows without their image, left out: 1 (")


@pytest.mark.parametrize("zipped", [False, True])
def test_pictures_that_the_table_does_not_name_are_noted_and_masks_are_none(
    tmp_path: Path, zipped: bool
) -> None:
    more = {"images/train/b_mask.png": mask(255), "images/train/new.png": FILES["d.png"], "images/x.txt": ""}
    src = fill(tmp_path / "skin", {**LAYOUT, **more, "elsewhere/y.png": FILES["e.png"]})
    (src / "labels.json").write_text(
        '{"a.png": {"dx": 1}, "b.png": {"dx": 0, "m": "b_mask.png"}, "c.png": {"dx": 1}}'
    )
    if zipped:
        src = Path(shutil.make_archive(str(src), "zip", src))
    tasks = {"classification": {"diagnosis": "dx"}, "segmentation": {"lesion": "m"}}
    manifest = prepare(src, tmp_path / "out", **tasks)
    assert "pictures beside them without a row, left out: 1 (images/train/new.png)" in manifest.notes


def test_a_task_without_labels_in_training_is_noted(tmp_path: Path) -> None:
    table = "file,split,age,dx\na.png,train,,x\nb.png,train,,x\nc.png,val,5,y\n"
    manifest = prepare(
        skin(tmp_path / "skin", table),
        tmp_path / "out",
        regression={"age": "age"},
        classification={"dx": "dx"},
    )
    assert manifest.notes == (
        "pictures beside them without a row, left out: 2 (d.png; e.png)",
        "dx: in other splits but not in train: y",
        "age: no labels in train",
    )
    assert (manifest.tasks["age"].mean, manifest.tasks["age"].std) == (0.0, 1.0)


def test_a_value_that_never_varies_has_a_spread_that_divides(tmp_path: Path) -> None:
    table = "file,split,age\na.png,train,5\nb.png,train,5\n"
    manifest = prepare(skin(tmp_path / "skin", table), tmp_path / "out", regression={"age": "age"})
    assert (manifest.tasks["age"].mean, manifest.tasks["age"].std) == (5.0, 1.0)


def test_a_value_may_be_below_zero(tmp_path: Path) -> None:
    table = "file,split,age\na.png,train,-5\nb.png,train,1.5\n"
    manifest = prepare(skin(tmp_path / "skin", table), tmp_path / "out", regression={"age": "age"})
    assert (manifest.tasks["age"].minimum, manifest.tasks["age"].maximum) == (-5.0, 1.5)
    assert manifest.splits["train"].labels["age"].present == 2


@pytest.mark.slow
@needs_data
def test_the_skin_lesions_are_prepared_as_their_description_says(tmp_path: Path) -> None:
    src = DATA / "skin-lesions" / "skin-lesions.zip"
    tasks = {**LAYOUT_TASKS, "segmentation": {"lesion": "masks"}}
    manifest = prepare(src, tmp_path / "out", **tasks, options=PackOptions(workers=1, verify=False))
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 1120, "val": 280}
    assert manifest.tasks["diagnosis"].classes == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    train, val = manifest.splits["train"].labels, manifest.splits["val"].labels
    assert (train["lesion"].missing, val["lesion"].missing) == (60, 0)
    assert train["age"].missing + val["age"].missing == 8
    lesion_share = train["lesion"].class_counts[1] / sum(train["lesion"].class_counts)
    assert 0.25 < lesion_share < 0.35  # a mask read upside down would be far off
    # The 59 palette masks have white at index 0: read by index, lesion and skin would be exchanged.
    palette_mask = by_key(tmp_path / "out", "train")["ISIC_0024318"]["lesion.png"]
    stored = np.asarray(Image.open(io.BytesIO(palette_mask)))
    assert (stored[0, 0], stored[75, 100]) == (0, 1)


@needs_data
def test_the_cells_are_prepared_as_their_description_says(tmp_path: Path) -> None:
    manifest = prepare(
        DATA / "hsv1-cells" / "hsv1-cells.zip",
        tmp_path / "out",
        classification={"infected": "infected"},
        regression={"hours": "hours_post_infection"},
        segmentation={name: f"masks_{name}" for name in ("nucleus", "mito", "er")},
        classes={"infected": ["uninfected", "infected"]},
    )
    assert sum(split.num_samples for split in manifest.splits.values()) == 192
    assert sum(split.labels["hours"].missing for split in manifest.splits.values()) == 64
    assert manifest.channels == 1
    assert all(
        split.labels[task].missing == 0 for split in manifest.splits.values() for task in ("nucleus", "er")
    )


def test_masks_in_colours_become_classes_by_their_colours(tmp_path: Path) -> None:
    painted = np.zeros((12, 10, 3), np.uint8)
    painted[:3], painted[3:5] = (128, 64, 128), (255, 0, 1)
    palette = Image.fromarray(painted).quantize(8)
    for number, image in enumerate(
        (Image.fromarray(painted), palette, Image.fromarray(painted).convert("RGBA"))
    ):
        files = {
            "a.png": picture(1, format="PNG"),
            "m/a.png": encoded(image),
            "t.csv": "file,split\na.png,train\n",
        }
        src = fill(tmp_path / f"in{number}", files)
        colours = {"s": "#000000:-,#804080:road,#ff0001:car"}
        manifest = prepare(src, tmp_path / f"out{number}", segmentation={"s": "m"}, colours=colours)
        assert (manifest.tasks["s"].classes, manifest.tasks["s"].class_counts) == (("road", "car"), (30, 20))
        (sample,) = read_back(tmp_path / f"out{number}", "train")
        stored = np.asarray(Image.open(io.BytesIO(sample["s.png"])))
        assert stored.tolist() == [[0] * 10] * 3 + [[1] * 10] * 2 + [[255] * 10] * 7
    for named, said in (
        (
            {"s": "#000000:ground,#804080:road"},
            r"expected the colours #000000, #804080, found #ff0001 on 20 pixel",
        ),
        ({"s": "0:ground,1:road"}, "--colours s: expected #RRGGBB:NAME"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(tmp_path / "in0", tmp_path / "no", segmentation={"s": "m"}, colours=named)


def test_a_value_of_a_mask_may_be_ignored_by_name(tmp_path: Path) -> None:
    files = {"a.png": picture(1, format="PNG"), "m/a.png": mask(7), "t.csv": "file,split\na.png,train\n"}
    classes = {"s": {0: "-", 7: "cell"}}
    manifest = prepare(
        fill(tmp_path / "in", files), tmp_path / "out", segmentation={"s": "m"}, classes=classes
    )
    assert (manifest.tasks["s"].classes, manifest.tasks["s"].class_counts) == (("cell",), (30,))
