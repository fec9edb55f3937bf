"""Points are the same from every source, beside an image of the size that they are in."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.map_style import split_reader
from mtl_dist.errors import UserError
from mtl_dist.importers import run
from mtl_dist.importers.external import with_indexes
from mtl_dist.importers.options import PackOptions
from mtl_dist.recipe import Recipe
from tests.source_files import HERE, fill, picture

NAMES = ("left_eye", "right_eye", "nose")
POINTS = [[[1, 2.5, 2], [3, 4, 1], [0, 0, 0]], None, [[15, 11, 2], [0, 0, 2], [99, 3, 2]]]
EXPECTED = [
    {"points": [[1, 2.5, 2], [3, 4, 1], [0, 0, 0]], "size": [16, 12]},
    None,
    {"points": [[15, 11, 2], [0, 0, 2], [0, 0, 0]], "size": [16, 12]},
]
CLASSES = {"face": NAMES}


def image(number: int) -> bytes:
    return picture(number, format="PNG", size=(16, 12))


def rows() -> list[dict[str, Any]]:
    return [
        {"file": f"{number}.png", "split": "train", "pts": points} for number, points in enumerate(POINTS)
    ]


def columns(root: Path) -> Path:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["file", "split", *(f"{name}_{what}" for name in NAMES for what in "xyv")])
    for row in rows():
        cells = [["", "", ""]] * 3 if row["pts"] is None else row["pts"]
        writer.writerow([row["file"], row["split"], *(value for point in cells for value in point)])
    images = {f"{number}.png": image(number) for number in range(3)}
    return fill(root, {"faces.csv": file.getvalue(), **images})


def of_columns(root: Path) -> Path:
    settings = {
        "source": columns(root / "in") / "faces.csv",
        "labels": {"face": f"keypoints:{','.join(NAMES)}"},
    }
    run("table", root / "out", settings, HERE)
    return root / "out"


def of_json(root: Path) -> Path:
    images = {f"{number}.png": image(number) for number in range(3)}
    source = fill(root / "in", {"faces.json": json.dumps(rows()), **images}) / "faces.json"
    run(
        "table",
        root / "out",
        {"source": source, "labels": {"face": "keypoints:pts"}, "classes": CLASSES},
        HERE,
    )
    return root / "out"


def of_parquet(root: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    (root / "in").mkdir()
    pictures = [{"bytes": image(number), "path": f"{number}.png"} for number in range(3)]
    pq.write_table(pyarrow.table({"image": pictures, "pts": POINTS}), root / "in" / "train.parquet")
    settings = {"source": root / "in", "labels": {"face": "keypoints:pts"}, "classes": CLASSES}
    run("parquet", root / "out", settings, HERE)
    return root / "out"


def of_tars(root: Path) -> Path:
    (root / "in").mkdir()
    with tarfile.open(root / "in" / "train.tar", "w") as tar:
        for number, points in enumerate(POINTS):
            label = {} if points is None else {"pts": points}
            for name, data in (
                (f"{number}.png", image(number)),
                (f"{number}.json", json.dumps(label).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    settings = {"source": [str(root / "in")], "labels": {"face": "keypoints:json:pts"}, "classes": CLASSES}
    run("tars", root / "out", settings, HERE)
    return root / "out"


class Faces(Dataset[Any]):
    """A Dataset of torch's form."""

    def __len__(self) -> int:
        return len(POINTS)

    def __getitem__(self, number: int) -> dict[str, Any]:
        points = POINTS[number]
        pixels = np.asarray(Image.open(io.BytesIO(image(number))))
        return {"image": pixels, "face": None if points is None else np.array(points)}


def of_dataset(root: Path) -> Path:
    source = {
        "dataset": {"kind": "tests.unit.importers.test_points.Faces"},
        "fields": {"face": {"kind": "keypoints", "classes": list(NAMES)}},
        "index": str(root / "out"),
    }
    data = {"train": [source], "image_size": 8, "workers": 0}
    recipe = Recipe.model_validate({"name": "x", "data": data}, strict=False)
    with_indexes(recipe.data, root)
    return root / "out"


@pytest.mark.parametrize("source", [of_columns, of_json, of_parquet, of_tars, of_dataset])
def test_points_are_the_same_from_every_source(source: Callable[[Path], Path], tmp_path: Path) -> None:
    out = source(tmp_path)
    manifest = read_manifest(out)
    info = manifest.tasks["face"]
    assert info.classes == NAMES and info.class_counts == (2, 2, 0) and info.num_labelled == 2
    assert info.facts["positions"][0][0] == 2
    assert any("face: points outside of their image, taken as missing: 1" in note for note in manifest.notes)
    reader = split_reader(out, manifest, "train")
    found = {sample.key[-1]: sample.labels.get("face") for sample in map(reader.read, range(3))}
    labelled = reader.labelled("face", np.arange(3))
    assert [label for label in found.values() if label and any(v for _, _, v in label["points"])] != []
    assert labelled.sum() == 2
    assert [found[str(number)] for number in (0, 2)] == [EXPECTED[0], EXPECTED[2]]


def turned(root: Path) -> Path:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.open(io.BytesIO(image(0))).save(file, "JPEG", exif=exif)
    table = "file,split,a_x,a_y\nt.jpg,train,7,4\nu.png,val,1,2\n"
    return fill(root, {"faces.csv": table, "t.jpg": file.getvalue(), "u.png": image(1)}) / "faces.csv"


def test_points_of_an_image_that_exif_turns_are_asked_for(tmp_path: Path) -> None:
    settings = {"source": turned(tmp_path / "in"), "labels": {"face": "keypoints:a"}}
    with pytest.raises(UserError, match="--masks-as displayed or --masks-as stored"):
        run("table", tmp_path / "none", settings, HERE)
    for said, expected in (("displayed", [7, 4, 2]), ("stored", [7, 7, 2])):
        run("table", tmp_path / said, settings, PackOptions(workers=1, masks_as=said))
        reader = split_reader(tmp_path / said, read_manifest(tmp_path / said), "train")
        assert reader.read(0).labels["face"] == {"points": [expected], "size": [12, 16]}


def test_a_row_with_another_number_of_points_is_named(tmp_path: Path) -> None:
    table = "file,pts\n0.png,1 2 3 4 5 6\n1.png,1 2 3 4\n"
    source = fill(tmp_path / "in", {"faces.csv": table, "0.png": image(0), "1.png": image(1)}) / "faces.csv"
    settings = {"source": source, "labels": {"face": "keypoints:pts"}, "classes": CLASSES}
    with pytest.raises(
        UserError, match=r"faces.csv line 3, column 'pts': expected x and y, .* found 4 values"
    ):
        run("table", tmp_path / "out", settings, HERE)
    with pytest.raises(UserError, match="table: expected a column 'nose', found"):
        run("table", tmp_path / "out", {**settings, "labels": {"face": "keypoints:pts,nose"}}, HERE)
