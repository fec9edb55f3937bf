"""Parquet and Arrow files of images, and imagefolders, become datasets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtl_dist.errors import UserError
from mtl_dist.importers import run
from tests.source_files import HERE, fill, labels, mask, picture, prepare, read_back

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["9", "cat", "dog"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["old", "wet"], "_type": "ClassLabel"}, "_type": "List"},
}


def rows(*numbers: int) -> dict[str, list[Any]]:
    return {
        "image": [{"bytes": picture(n, format="PNG"), "path": f"{n}.png"} for n in numbers],
        "label": [n % 4 - 1 for n in numbers],
        "tags": [[0, 1][: n % 3] for n in numbers],
        "age": [n / 2 if n else None for n in numbers],
        "seg": [{"bytes": mask(255), "path": None} if n % 2 else None for n in numbers],
    }


def table(*numbers: int, features: dict[str, Any] = FEATURES) -> Any:
    made = pyarrow.table(rows(*numbers))
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


ALL = {
    "labels": {
        "y": "classification:label",
        "tags": "multilabel:tags",
        "age": "regression:age",
        "m": "segmentation:seg",
    }
}


def written(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    files = {"train-00000-of-00002": (0, 1, 2), "train-00001-of-00002": (3, 5), "validation": (6, 7)}
    for name, numbers in files.items():
        pq.write_table(table(*numbers), root / "data" / f"{name}.parquet", row_group_size=2)
    return root


def test_nulls_among_lists_are_told_from_empty_lists(tmp_path: Path) -> None:
    columns = {"image": [{"bytes": picture(n)} for n in range(4)], "tags": [["a", "b"], None, [], None]}
    (tmp_path / "in").mkdir()
    pq.write_table(pyarrow.table(columns), tmp_path / "in" / "t.parquet")
    settings = {"source": tmp_path / "in", "labels": {"tags": "multilabel:tags"}}
    manifest = run("parquet", tmp_path / "out", settings, HERE)
    assert sorted(map(str, labels(tmp_path / "out").values())) == sorted(
        map(str, ({"tags": [0, 1]}, {}, {"tags": []}, {}))
    )
    assert "tags: empty cells, missing labels and not 'none of the classes', which is []: 2" in manifest.notes


def test_rows_of_a_hugging_face_dataset_become_samples(tmp_path: Path) -> None:
    manifest = run("parquet", tmp_path / "out", {"source": written(tmp_path / "in"), **ALL}, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 5, "val": 2}
    assert manifest.tasks["y"].classes == ("9", "cat", "dog")
    assert manifest.tasks["tags"].classes == ("old", "wet")
    assert labels(tmp_path / "out") == {
        "0": {"tags": []},
        "1": {"y": 0, "tags": [0], "age": 0.5},
        "2": {"y": 1, "tags": [0, 1], "age": 1.0},
        "3": {"y": 2, "tags": [], "age": 1.5},
        "5": {"y": 0, "tags": [0, 1], "age": 2.5},
        "6": {"y": 1, "tags": [], "age": 3.0},
        "7": {"y": 2, "tags": [0], "age": 3.5},
    }
    samples = {each["__key__"]: each for each in read_back(tmp_path / "out", "train")}
    assert all(samples[str(n)]["png"] == picture(n, format="PNG") for n in (0, 1, 2, 3, 5))
    assert {key for key, each in samples.items() if "m.png" in each} == {"1", "3", "5"}
    assert manifest.account["rows"] == {"sample": 7}
    assert manifest.account["files"] == {"table": 3}


def test_arrow_files_say_the_same(tmp_path: Path) -> None:
    made = table(0, 1, 2, 3)
    (tmp_path / "in" / "train").mkdir(parents=True)
    place = str(tmp_path / "in" / "train" / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(place, "wb") as file, pyarrow.ipc.new_stream(file, made.schema) as stream:
        stream.write_table(made)
    manifest = run("parquet", tmp_path / "out", {"source": tmp_path / "in", **ALL}, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 4}
    assert labels(tmp_path / "out")["3"] == {"y": 2, "tags": [], "age": 1.5}


def test_images_may_be_paths_and_rows_without_one_are_left_out(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", {f"pics/{n}.png": picture(n) for n in range(2)})
    made = pyarrow.table({"image": ["pics/0.png", "pics/1.png", None], "dx": ["1E50", "01", "x"]})
    pq.write_table(made, root / "all.parquet")
    settings = {"source": root / "all.parquet", "labels": {"dx": "classification:dx"}}
    with pytest.raises(UserError, match="row 2: expected an image in column 'image', found nothing"):
        run("parquet", tmp_path / "no", settings, HERE)
    manifest = run("parquet", tmp_path / "out", settings, replace(HERE, max_skipped=1, split=(0.5, 0.5)))
    assert set(manifest.tasks["dx"].classes) == {"1E50", "01", "x"}
    assert manifest.account["rows"] == {"sample": 2, "left out: it has no image": 1}


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", {"a.parquet": b"PAR1 no"})
    with pytest.raises(UserError, match="expected a parquet or Arrow file, found"):
        run("parquet", tmp_path / "out", {"source": root, **ALL}, HERE)
    with pytest.raises(
        UserError, match=r"expected a .parquet or .arrow file, or a directory of them, found none"
    ):
        run("parquet", tmp_path / "out", {"source": fill(tmp_path / "none", {"a.txt": ""}), **ALL}, HERE)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_imagefolder_is_a_table_in_each_split(tmp_path: Path, form: str) -> None:
    files: dict[str, Any] = {}
    for split, numbers in (("train", (0, 1)), ("test", (2, 3))):
        files |= {f"{split}/{n % 2}.png": picture(n) for n in numbers}
        cells = [(f"{n % 2}.png", f"c{n % 2}") for n in numbers]
        lines = [f"{a},{b}" for a, b in cells] if form == "csv" else [
            json.dumps({"file_name": a, "text": b}) for a, b in cells
        ]  # fmt: skip
        head = ["file_name,text"] if form == "csv" else []
        files[f"{split}/metadata.{form}"] = "\n".join([*head, *lines]) + "\n"
    src = fill(tmp_path / "in", files)
    manifest = prepare(src, tmp_path / "out", image="file_name", classification={"y": "text"})
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "test": 2}
    assert manifest.account["files"] == {"image": 4, "table": 2}


def test_files_and_images_of_one_name_in_several_splits_are_all_kept(tmp_path: Path) -> None:
    for split, numbers in (("train", (0, 1)), ("validation", (2, 3)), ("test", (4, 5))):
        made = table(*numbers)
        pictures = [
            {"bytes": picture(n, format="PNG"), "path": "image.png" if n < 4 else None} for n in numbers
        ]
        at = made.schema.get_field_index("image")
        made = made.set_column(at, "image", pyarrow.array(pictures, made.schema.field("image").type))
        (tmp_path / "in" / split).mkdir(parents=True)
        pq.write_table(made, tmp_path / "in" / split / "data-00000-of-00001.parquet")
    settings = {"source": tmp_path / "in", "labels": {"y": "classification:label"}}
    manifest = run("parquet", tmp_path / "out", settings, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 2,
        "val": 2,
        "test": 2,
    }
