"""A mistake in a table, or in what is asked of it, is one clear line, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtl_dist.errors import UserError
from tests.source_files import ALL, CSV, FILES, MASKS, fill, mask, picture, prepare, skin


def refused(tmp_path: Path, src: Path, match: str, **arguments: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=match) as caught:
        prepare(src, tmp_path / "out", **(arguments or ALL))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


WRONG_TABLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a class index beyond the names": (
        "file,split,dx\na.png,train,9\n",
        {"classification": {"dx": "dx"}, "classes": {"dx": ["x", "y"]}},
        r"labels\.csv line 2, column 'dx': expected a class index from 0 to 1 \(x, y\), found 9",
    ),
    "a misspelt class": (
        "file,split,dx\na.png,train,bening\n",
        {"classification": {"dx": "dx"}, "classes": {"dx": ["benign", "malignant"]}},
        r"expected a class of benign, malignant, found 'bening'. Did you mean 'benign'\?",
    ),
    "text for a number": (
        "file,split,age\na.png,train,old\n",
        {"regression": {"age": "age"}},
        "line 2, column 'age': expected a number or nothing, found 'old'",
    ),
    "words where no number is": (
        "file,split,size\na.png,train,S1\nb.png,train,\nc.png,train,S2\n",
        {"regression": {"size": "size"}},
        "line 2, column 'size': expected a number or nothing, found 'S1', and no number anywhere else. "
        "Name another column; where these are classes, --classification or --ordinal takes them.$",
    ),
    "a word among numbers": (
        "file,split,size\na.png,train,1.5\nb.png,train,?\n",
        {"regression": {"size": "size"}},
        r"line 3, column 'size': expected a number or nothing, found '\?'. Say which words mean none",
    ),
    "grades in words": (
        "file,split,grade\na.png,train,low\n",
        {"ordinal": {"grade": "grade"}},
        "found 'low'. Name grades from low to high: --classes TASK=LOW,MID,HIGH.",
    ),
    "an infinite number": (
        "file,split,age\na.png,train,inf\n",
        {"regression": {"age": "age"}},
        "expected a number or nothing, found 'inf'",
    ),
    "a misspelt column": (
        "file,split,age\na.png,train,1\n",
        {"regression": {"age": "agee"}},
        r"expected a column 'agee', found 'file', 'split', 'age'. Did you mean 'age'\?",
    ),
    "a row with a cell too many": (
        "file,split,dx\na.png,train,nv, common\n",
        {"classification": {"dx": "dx"}},
        "line 2: expected 3 cells as in the first line, found 4",
    ),
    "two columns of one name": (
        "file,dx,dx\na.png,1,2\n",
        {"classification": {"dx": "dx"}},
        "found 'dx' twice",
    ),
    "no rows": ("file,dx\n", {"classification": {"dx": "dx"}}, "expected rows, found none"),
    "a task without any label": (
        "file,split,age,dx\na.png,train,,x\n",
        {"classification": {"dx": "dx"}, "regression": {"age": "age"}},
        "task 'age': expected labels, found none in 1 sample",
    ),
    "no task": ("file,split\na.png,train\n", {"split": "split"}, "expected at least one task"),
    "an image in two splits": (
        "file,split,dx\na.png,train,x\na.png,val,x\n",
        {"classification": {"dx": "dx"}},
        r"line 3: expected the image 'a\.png' once, found it also in .* line 2 with another 'split'",
    ),
    "an image with two labels": (
        "file,split,dx\na.png,train,x\na.png,train,y\n",
        {"classification": {"dx": "dx"}},
        "with another 'dx'. Keep one of the rows",
    ),
    "an empty split": (
        "file,split,dx\na.png,,x\n",
        {"classification": {"dx": "dx"}},
        "line 2, column 'split': expected a split",
    ),
    "an unknown split column": (
        "file,dx\na.png,x\n",
        {"classification": {"dx": "dx"}, "split": "fold"},
        r"split: expected fractions or a column \(file, dx\), found 'fold'",
    ),
    "an empty file name": (
        "file,split,dx\n,train,x\n",
        {"classification": {"dx": "dx"}},
        "expected a file name in column 'file', found nothing",
    ),
    "a mask that is not there": (
        "file,split,m\na.png,train,masks/z.png\n",
        {"segmentation": {"m": "m"}},
        r"expected the mask 'masks/z\.png' in .*, found no such file",
    ),
    "a folder of masks that is not there": (
        "file,split\na.png,train\n",
        {"segmentation": {"m": "msks"}},
        "masks 'msks': expected a column of the table or one folder in .*, found neither",
    ),
    "classes of no task": (
        "file,split,dx\na.png,train,x\n",
        {"classification": {"dx": "dx"}, "classes": {"xd": ["a"]}},
        "classes: expected one of the tasks dx, found 'xd'",
    ),
    "a quote that never ends": (
        'file,split,dx\na.png,train,"x\n',
        {"classification": {"dx": "dx"}},
        "expected a table, found: unexpected end of data",
    ),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_table_is_one_clear_line(tmp_path: Path, name: str) -> None:
    table, arguments, match = WRONG_TABLES[name]
    refused(tmp_path, skin(tmp_path / "skin", table), match, **arguments)


def test_a_task_of_two_kinds_is_refused(tmp_path: Path) -> None:
    both: dict[str, Any] = {"regression": {"x": "age"}, "classification": {"x": "dx"}}
    refused(tmp_path, skin(tmp_path / "skin"), "expected each name once, found 'x' twice", **both)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    src = skin(tmp_path / "skin")
    (src / "labels.csv").write_bytes("file,split,dx\na.png,train,Größe\n".encode("latin-1"))
    refused(tmp_path, src, "expected UTF-8 text", classification={"dx": "dx"})


def test_json_that_is_no_table_is_refused(tmp_path: Path) -> None:
    for number, (text, match) in enumerate(
        [
            ("{", "expected JSON"),
            ("[1, 2]", "expected a list of objects"),
            ('{"a.png": 1, "a.png": 2}', "found 'a.png' twice"),
            ('[{"file": {"x": 1}}]', "expected text, a number or a list"),
        ]
    ):
        src = fill(tmp_path / f"src{number}", {"labels.json": text, **FILES})
        refused(tmp_path, src, match, classification={"dx": "label"})


def test_a_directory_without_one_table_is_refused(tmp_path: Path) -> None:
    one, two = {"a.csv": CSV}, {"a.csv": CSV, "b.csv": CSV}
    refused(tmp_path, fill(tmp_path / "none", FILES), "found no csv, tsv or json")
    refused(
        tmp_path,
        fill(tmp_path / "two", {**two, **FILES}),
        r"a single table in it, or lists .*, found a\.csv; b\.csv",
    )
    refused(tmp_path, tmp_path / "nowhere", "found nothing there")
    prepare(fill(tmp_path / "one", {**one, **FILES, **MASKS}), tmp_path / "out", **ALL)


def test_a_name_that_several_files_have_is_refused(tmp_path: Path) -> None:
    files = {"x/a.png": picture(1), "y/a.png": picture(2), "labels.csv": "file,dx\na.png,1\n"}
    refused(tmp_path, fill(tmp_path / "src", files), r"found x/a\.png, y/a\.png", classification={"dx": "dx"})


def test_a_mask_of_another_size_than_its_image_names_both_sizes(tmp_path: Path) -> None:
    src = fill(skin(tmp_path / "skin"), {"masks/c.png": mask(255, (12, 10))})
    refused(tmp_path, src, r"masks/c\.png: expected the size of its image, 10x12, found 12x10")


def test_a_mask_value_beyond_the_classes_is_named(tmp_path: Path) -> None:
    src = fill(skin(tmp_path / "skin"), {"masks/c.png": mask(7)})
    classes = {"lesion": ["skin", "nevus", "melanoma"]}
    refused(
        tmp_path,
        src,
        r"task 'lesion': expected class indices from 0 to 2 .*, found (7|255)",
        **ALL,
        classes=classes,
    )


def test_an_unreadable_mask_is_named(tmp_path: Path) -> None:
    src = fill(skin(tmp_path / "skin"), {"masks/c.png": b"\x89PNG"})
    refused(tmp_path, src, r"masks/c\.png: expected a readable image, found")


def test_masks_whose_greys_are_all_dark_are_no_empty_masks(tmp_path: Path) -> None:
    skin(tmp_path / "skin")
    names = [path.name for path in (tmp_path / "skin" / "masks").iterdir()]
    src = fill(tmp_path / "skin", {f"masks/{name}": mask(7) for name in names})
    refused(tmp_path, src, r"expected greys of 128 and above for .* found darker ones alone, as in .*\.png")


def test_masks_of_indices_and_masks_of_greys_do_not_mix_in_a_task(tmp_path: Path) -> None:
    src = fill(skin(tmp_path / "skin"), {"masks/c.png": mask(1)})
    refused(tmp_path, src, r"found class indices \(0, 1\) in .*c\.png and greys up to 255 in .*\.png")
    by_value = {"lesion": {0: "skin", 1: "lesion"}}
    manifest = prepare(src, tmp_path / "out", **ALL, classes=by_value)
    assert manifest.tasks["lesion"].class_counts == (180, 30)  # the 255 of the other is ignored now


# ---------------------------------------------------------------- what spreadsheets and Windows write
@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nfile;dx\na.jpg;x\nb.jpg;y\n",
        "file,dx\na.jpg,x,\nb.jpg,y,,,\n",
        "file,dx\na.jpg,x\n,,,\nb.jpg,y\n",
        "file  dx\na.jpg x\nb.jpg   y\n",
        "file,dx\nin\\a.jpg,x\n.\\in\\b.jpg,y\n",
    ],
)
def test_what_spreadsheets_and_windows_write_is_read(tmp_path: Path, text: str) -> None:
    src = fill(tmp_path / "src", {"in/a.jpg": picture(1), "in/b.jpg": picture(2), "t.csv": text.encode()})
    manifest = prepare(src / "t.csv", tmp_path / "out", classification={"dx": "dx"}, split=(0.5, 0.5))
    assert manifest.tasks["dx"].classes == ("x", "y")
    assert sum(split.num_samples for split in manifest.splits.values()) == 2


def test_a_name_that_differs_in_case_or_extension_is_offered(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", {"a.jpg": picture(1), "t.csv": b"file,dx\nA.JPG,x\n"})
    with pytest.raises(UserError, match=r"expected the image 'A.JPG' .* Did you mean a\.jpg\?"):
        prepare(src / "t.csv", tmp_path / "out", classification={"dx": "dx"})
