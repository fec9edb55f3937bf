"""Plain lists, patterns of names, legends and lists of splits: what people keep beside their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtl_dist.errors import UserError
from mtl_dist.importers.lists import read_list
from tests.source_files import fill, labels, mask, picture, prepare, prepare_folders

HALVES = {"split": (0.5, 0.5)}


def pictures(*names: str) -> dict[str, bytes]:
    return {name: picture(number, format="PNG") for number, name in enumerate(names)}


def of_list(root: Path, text: str, **arguments: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    files = pictures("00.png", "01.png", "my cat.png", "02.png")
    src = fill(root / "in", {"list.txt": text, **files}) / "list.txt"
    manifest = prepare(src, root / "out", **{**HALVES, "classification": {"y": "label"}, **arguments})
    names = manifest.tasks["y"].classes
    return {key: names[found["y"]] for key, found in labels(root / "out").items() if found}, manifest.notes


LISTS = {
    "blanks": "00.png a\n01.png   b\n\n02.png b\n",
    "tabs": "00.png\ta\n01.png\tb\n02.png\tb\n",
    "commas": "00.png,a\n01.png, b\n02.png,b\n",
    "labels first": "a 00.png\nb 01.png\nb 02.png\n",
    "folders before": "in/00.png a\n./01.png b\n/data/in/02.png b\n",
    "paths from a root of others": "/00.png a\n/01.png b\n/02.png b\n",
    "without extensions, under a comment": "# a list of mine\n00 a\n01 b\n02 b\n",
    "a first line of names": "file label\n00.png a\n01.png b\n02.png b\n",
    "names in a comment": "# two lines\n# file label\n00.png a\n01.png b\n02.png b\n",
}


@pytest.mark.parametrize("form", LISTS)
def test_a_plain_list_says_the_same_in_every_form(tmp_path: Path, form: str) -> None:
    found, _ = of_list(tmp_path, LISTS[form])
    assert found == {"00": "a", "01": "b", "02": "b"}


def test_paths_with_blanks_are_read_whole(tmp_path: Path) -> None:
    assert of_list(tmp_path, "my cat.png a\n00.png b\n")[0] == {"my_cat": "a", "00": "b"}
    assert of_list(tmp_path / "quoted", '"my cat.png" a\n00.png b\n')[0] == {"my_cat": "a", "00": "b"}


def test_the_columns_of_a_list_have_the_names_in_its_comment(tmp_path: Path) -> None:
    src = fill(tmp_path / "in", {"l.txt": "# image class\n00 1\n01 2\n", **pictures("00.png", "01.png")})
    manifest = prepare(
        src / "l.txt", tmp_path / "out", image="image", classification={"class": "class"}, **HALVES
    )
    assert manifest.tasks["class"].classes == ("1", "2")
    assert manifest.account["rows"] == {"sample": 2, "left out: a comment": 1}
    assert "columns of l.txt are separated by blanks" in manifest.notes


def test_a_list_without_names_says_which_it_gives(tmp_path: Path) -> None:
    text = "00.png 3 x\n01.png 4 y\n"
    src = fill(
        tmp_path / "in", {"l.txt": text, "l.csv": text.replace(" ", ","), **pictures("00.png", "01.png")}
    )
    for name in ("l.txt", "l.csv"):
        manifest = prepare(src / name, tmp_path / name, classification={"y": "label_2"}, **HALVES)
        assert manifest.tasks["y"].classes == ("x", "y")
        assert f"{name} has no line of column names: file, label_1, label_2" in manifest.notes


def test_a_line_with_more_cells_than_the_others_is_refused() -> None:
    with pytest.raises(UserError, match=r"l line 2: expected 2 cell\(s\) as in most lines, found 3"):
        read_list("0.png a\n1.png a b\n2.png c\n", "l", lambda cell: cell.endswith(".png"))


def test_legends_and_short_lines_are_left_out_or_read_and_said(tmp_path: Path) -> None:
    table = "file,dx,age\n00.png,mel,4\n,code,years\n01.png,nv\n\n"
    table += "mel = melanoma\nLegend,nv = nevus,\n02.png,nv,5\n"
    src = fill(tmp_path / "in", {"t.csv": table, **pictures("00.png", "01.png", "02.png")})
    manifest = prepare(
        src / "t.csv", tmp_path / "out", classification={"dx": "dx"}, regression={"age": "age"}, **HALVES
    )
    assert labels(tmp_path / "out") == {
        "00": {"dx": 0, "age": 4.0},
        "01": {"dx": 1},
        "02": {"dx": 1, "age": 5.0},
    }
    assert manifest.account["rows"] == {"sample": 3, "left out: a legend, which names no image": 3}
    notes = "\n".join(manifest.notes)
    assert "rows that name no image, such as a legend, left out: 3 (" in notes
    assert "lines with fewer cells than columns, whose last labels are missing: 1 (" in notes


def test_images_and_masks_are_named_by_patterns(tmp_path: Path) -> None:
    files = {f"pics/{n}_x.png": picture(n, format="PNG") for n in range(3)}
    files |= {f"masks/{n}_x_seg.png": mask(255) for n in range(2)}
    src = fill(tmp_path / "in", {"t.csv": "no,dx\n0,a\n1,b\n2,a\n", **files}) / "t.csv"
    named = {"image": "{no}_x.png", "classification": {"dx": "dx"}, **HALVES}
    for number, pattern in enumerate(
        ("{id}_seg.png", "masks/{no}_x_seg.png", "{folder}/../masks/{id}_seg.png")
    ):
        manifest = prepare(src, tmp_path / f"out{number}", segmentation={"m": pattern}, **named)
        assert sum(split.labels["m"].present for split in manifest.splits.values()) == 2
        assert "m: images without a file of that pattern, unlabelled: 1 (pics/2_x.png)" in manifest.notes
        assert manifest.account["files"] == {"image": 3, "mask": 2, "table": 1}
    for pattern, said in (
        ("{ID}_seg.png", r"expected columns of the table \(no, dx\) or \{id\}.* found 'ID'"),
        ("{id}_mask.png", r"--segmentation m=\{id\}_mask.png: expected the file '0_x_mask.png' in .*neither"),
        ("pics", r"expected maps called as their images, such as 0_x.png for 0_x.png, found none"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(src, tmp_path / "no", segmentation={"m": pattern}, **named)


def test_a_folder_of_images_and_masks_never_takes_an_image_for_its_mask(tmp_path: Path) -> None:
    files = {"0.jpg": picture(0), "1.jpg": picture(1), "0_seg.png": mask(255), "1_seg.png": mask(255)}
    src = fill(tmp_path / "in", {"t.csv": "id,dx\n0,a\n1,b\n", **files}) / "t.csv"
    named = {"image": "id", "classification": {"dx": "dx"}, **HALVES}
    for folder in (".", str(src.parent)):
        with pytest.raises(UserError, match=r"A pattern names others: '\{id\}_seg.png'"):
            prepare(src, tmp_path / "out", segmentation={"m": folder}, **named)


def test_a_root_holds_for_columns_folders_and_patterns(tmp_path: Path) -> None:
    files = {"pics/0.png": picture(0), "pics/1.png": picture(1), "m/0.png": mask(255), "m/1.png": mask(255)}
    root = fill(tmp_path / "root", files)
    src = (
        fill(tmp_path / "tables", {"t.csv": "file,mask\npics/0.png,m/0.png\npics/1.png,m/1.png\n"}) / "t.csv"
    )
    for number, masks in enumerate(("mask", "m", "m/{id}.png", "{folder}/../m/{id}.png")):
        manifest = prepare(src, tmp_path / f"out{number}", root=root, segmentation={"s": masks}, **HALVES)
        assert sum(split.labels["s"].present for split in manifest.splits.values()) == 2
    with pytest.raises(UserError, match=r"expected the image 'pics/0.png' in .*tables, found no such file"):
        prepare(src, tmp_path / "no", segmentation={"s": "mask"}, **HALVES)


def test_lists_called_as_splits_are_one_table(tmp_path: Path) -> None:
    files = pictures("a.png", "b.png", "c.png", "d.png")
    texts = {"train.txt": "a.png x\nb.png y\n", "val.txt": "c.png x\n", "test.txt": "d.png y\n"}
    as_csv = {
        name.replace("txt", "csv"): "file,label\n" + text.replace(" ", ",") for name, text in texts.items()
    }
    for number, tables in enumerate((texts, as_csv)):
        src = fill(tmp_path / f"in{number}", {**tables, **files})
        manifest = prepare(src, tmp_path / f"out{number}", classification={"y": "label"})
        assert {name: split.num_samples for name, split in manifest.splits.items()} == {
            "train": 2,
            "val": 1,
            "test": 1,
        }
        assert manifest.account["files"] == {"image": 4, "table": 3}


def test_lists_of_splits_beside_a_table_or_class_folders_are_used(tmp_path: Path) -> None:
    files = pictures(*(f"{kind}/{n}.png" for kind in "xy" for n in range(3)))
    table = "file,dx\n" + "".join(f"{name},{name[0]}\n" for name in files)
    lists = {"train.txt": "x/0\ny/0\nx/1.png\ny/1\n", "test.txt": "data/x/2.png\ny/2\ngone/9\n"}
    for number, (more, run) in enumerate((({"t.csv": table}, prepare), ({}, prepare_folders))):
        src = fill(tmp_path / f"in{number}", {**files, **lists, **more})
        named = {"classification": {"dx": "dx"}} if more else {"task": "dx"}
        manifest = run(src, tmp_path / f"out{number}", **named)
        assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 4, "test": 2}
        notes = "\n".join(manifest.notes)
        assert "splits taken from the lists" in notes
        assert "lines of them that name no image: 1 (test.txt line 3)" in notes
        (src / "test.txt").write_text("x/2\ny/2\nx/0\n")
        with pytest.raises(UserError, match=r"expected 'x/0.png' in one of .*, found it in test and train"):
            run(src, tmp_path / "no", **named)
        (src / "test.txt").write_text("x/2\n")
        with pytest.raises(UserError, match=r"expected one for every sample.* found none for 1 \(y/2.png\)"):
            run(src, tmp_path / "no", **named)


def test_tables_of_one_name_in_folders_of_splits_are_one_table(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for split, truths in (("train", "10 01 11"), ("valid", "01 10")):
        rows = ["filename, cat, dog"]
        for number, truth in enumerate(truths.split()):  # of the same names in both
            files[f"{split}/{number}.jpg"] = picture(len(files))
            rows.append(f"{number}.jpg, {truth[0]}, {truth[1]}")
        files[f"{split}/_classes.csv"] = "\n".join(rows)
    wanted: dict[str, Any] = {"image": "filename", "classification": {"cat": "cat", "dog": "dog"}}
    manifest = prepare(fill(tmp_path / "in", files), tmp_path / "out", **wanted)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 3, "val": 2}
    assert manifest.splits["train"].labels["cat"].class_counts == (1, 2)
    assert manifest.splits["val"].labels["cat"].class_counts == (1, 1)
    assert "splits taken from the tables train/_classes.csv, valid/_classes.csv" in manifest.notes


def test_labels_of_fiftyone_have_their_class_names(tmp_path: Path) -> None:
    content = {"classes": ["dog", "cat"], "labels": {"a": 1, "b": 0, "c": None}}
    files = {"labels.json": content, **{f"data/{name}.jpg": picture(n) for n, name in enumerate("abc")}}
    wanted: dict[str, Any] = {**HALVES, "classification": {"y": "label"}}
    manifest = prepare(fill(tmp_path / "in", files), tmp_path / "out", **wanted)
    names = manifest.tasks["y"].classes
    found = {key: names[each["y"]] for key, each in labels(tmp_path / "out").items() if each}
    assert found == {"a": "cat", "b": "dog"} and names == ("dog", "cat")
