"""`mtl prepare auto` says what data is taken for, asks for what it cannot know, and does the rest."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from mtl_dist.errors import UserError
from mtl_dist.importers import run
from tests.source_files import HERE, fill, picture

PICTURES = {f"{kind}/{n}.png": picture(n, format="PNG") for n, kind in enumerate("xyxyxy")}
IDX = {
    "train-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">3I", 20, 2, 2) + bytes(80),
    "train-labels-idx1-ubyte": b"\0\0\x08\x01" + struct.pack(">I", 20) + bytes([0, 1] * 10),
}
FLAT = {f"{n}.png": picture(n, format="PNG") for n in range(6)}
TABLE = {"t.csv": "name,dx,age\n" + "".join(f"{n}.png,{'ab'[n % 2]},{n}\n" for n in range(6)), **FLAT}
VOC = "<annotation><filename>{}.png</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>\
<xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"
COCO = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": 10, "height": 12} for n in range(6)],
    "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 0}],
    "categories": [{"id": 1, "name": "cat"}],
}
LABELME: dict[str, Any] = {"imagePath": "0.png", "imageHeight": 12, "imageWidth": 10, "shapes": []}
CVAT = "<annotations>" + "".join(
    f'<image name="{n}.png" width="10" height="12"><tag label="ab"/></image>' for n in range(6)
) + "</annotations>"  # fmt: skip
FOUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "class folders": (PICTURES, {}),
    "IDX files": (IDX, {}),
    "CIFAR's records": ({"train.bin": bytes(3073 * 20), "batches.meta.txt": "a\nb\n"}, {}),
    "a table": (TABLE, {"labels": {"dx": "classification:dx"}}),
    "Pascal VOC": ({**FLAT, **{f"{n}.xml": VOC.format(n) for n in range(6)}}, {}),
    "COCO's JSON": ({**FLAT, "all.json": COCO}, {}),
    "YOLO's text files": ({**FLAT, "0.txt": "0 0.5 0.5 0.1 0.1\n", "classes.txt": "cat\n"}, {}),
    "CVAT's XML": ({**FLAT, "all.xml": CVAT}, {}),
    "LabelMe's JSON": (
        {"0.png": FLAT["0.png"], "1.png": FLAT["1.png"],
         "0.json": {**LABELME, "shapes": [{"label": "c", "points": [[0, 0], [4, 0], [4, 4]]}]},
         "1.json": {**LABELME, "imagePath": "1.png"}},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_what_data_is_taken_for_is_said_and_done(tmp_path: Path, what: str) -> None:
    files, settings = FOUND[what]
    manifest = run("auto", tmp_path / "out", {"source": fill(tmp_path / "in", files), **settings}, HERE)
    assert any(note.startswith(f"taken for {what}, because ") for note in manifest.notes)
    assert manifest.account["images"]["sample"] == sum(
        split.num_samples for split in manifest.splits.values()
    )


def test_tars_are_indexed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.png", FLAT["0.png"]), ("0.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    settings = {"source": tmp_path / "a.tar", "labels": {"y": "classification:cls"}}
    assert run("auto", tmp_path / "out", settings, HERE).labels == "columns"
    with pytest.raises(UserError, match=r"taken for tars of samples: .* Say which, such as --classification"):
        run("auto", tmp_path / "no", {"source": tmp_path / "a.tar"}, HERE)


def test_a_dataset_that_is_prepared_is_not_prepared_again(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"found a dataset that is prepared. .* mtl inspect"):
        run("auto", tmp_path / "no", {"source": tmp_path}, HERE)


def test_what_cannot_be_known_is_asked_for_by_its_options(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((5, 8, 8), np.uint8), photometric="minisblack")
    for number, (files, said) in enumerate(
        (
            (
                TABLE,
                r"t.csv has 6 rows that name pictures by name: .* Say it, such as --classification dx=dx",
            ),
            (
                {"train.bin": bytes(3075 * 4)},
                r"have 3 label\(s\): expected a name for each. Say --heads NAME1",
            ),
            ({"s.tif": buffer.getvalue()}, "taken for stacks, because .* mtl prepare stacks"),
            ({"a/b/0.png": FLAT["0.png"], "c/d/1.png": FLAT["1.png"]}, "--levels label,TASK"),
            (FLAT, "found 6 pictures in one folder alone"),
            ({"a.docx": b"x"}, "expected pictures, records, tables or tars, found a.docx"),
            ({"README.md": b"x", "a.zip": b"x"}, "found README.md; a.zip. Give one archive, such as .*a.zip"),
        )
    ):
        with pytest.raises(UserError, match=rf"{said}") as error:
            run("auto", tmp_path / "out", {"source": fill(tmp_path / f"in{number}", files)}, HERE)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [b"garbage", b"II*\0", b""])
def test_a_damaged_tiff_is_said_by_the_importer_that_reads_it(
    tmp_path: Path, damage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    source = fill(tmp_path / "in", {"a/1.tif": damage, "b/2.tif": damage})
    with pytest.raises(UserError, match="tif"):
        run("auto", tmp_path / "out", {"source": source}, HERE)
    assert "tifffile" not in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
