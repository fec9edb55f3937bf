"""Pascal VOC's files become labels, masks and boxes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_dist.errors import UserError
from mtl_dist.importers import run
from tests.source_files import HERE, encoded, fill, labels, picture, read_back


def xml(name: str, *objects: tuple[str, tuple[int, int, int, int], int]) -> str:
    found = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for label, box, difficult in objects
    )
    return f"<annotation><filename>{name}.jpg</filename>{found}</annotation>"


def palette_mask() -> bytes:
    values = np.zeros((12, 10), np.uint8)
    values[:3], values[3] = 8, 255
    image = Image.fromarray(values, "L").convert("P")
    image.putdata(values.ravel().tolist())
    return encoded(image)


def source(tmp_path: Path, lists: bool = True) -> Path:
    files: dict[str, bytes | str] = {
        "Annotations/a.xml": xml("a", ("cat", (1, 1, 5, 6), 0), ("dog", (2, 2, 3, 3), 1)),
        "Annotations/b.xml": xml("b", ("person", (2, 3, 9, 12), 0)),
        "Annotations/c.xml": xml("c"),
        "Annotations/d.xml": xml("d", ("cat", (1, 1, 2, 2), 0)),
        **{f"JPEGImages/{name}.jpg": picture(seed) for seed, name in enumerate("abcd")},
        **{f"SegmentationClass/{name}.png": palette_mask() for name in "abc"},
    }
    if lists:
        files |= {
            "ImageSets/Main/train.txt": "a\nb\n",
            "ImageSets/Main/val.txt": "c\n",
            "ImageSets/Main/cat_train.txt": "a  1\nb -1\n",
        }
    return fill(tmp_path / "voc", files)


def test_voc_becomes_labels_and_boxes_in_its_splits(tmp_path: Path) -> None:
    settings = {"source": source(tmp_path), "categories": "objects", "box": {"cat": "cat"}}
    manifest = run("voc", tmp_path / "out", settings, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}
    cat, dog, person = (manifest.tasks["objects"].classes.index(name) for name in ("cat", "dog", "person"))
    assert labels(tmp_path / "out") == {
        "a": {"objects": [cat, dog], "cat_xmin": 0, "cat_ymin": 0, "cat_xmax": 5, "cat_ymax": 6},
        "b": {"objects": [person]},
        "c": {"objects": []},
    }
    assert manifest.account["files"] == {
        "image": 3,
        "table": 5,
        "left out: in no list of a split": 1,
        "left out: no annotation names it": 4,
        "left out: no image by its name": 1,
    }
    assert manifest.account["regions"] == {"label": 3}
    skipped = run("voc", tmp_path / "skipped", {**settings, "difficult": "skip"}, HERE)
    assert skipped.account["regions"] == {"label": 2, "left out: difficult": 1}


def test_vocs_masks_keep_their_values(tmp_path: Path) -> None:
    manifest = run("voc", tmp_path / "out", {"source": source(tmp_path), "masks": "scene"}, HERE)
    assert manifest.tasks["scene"].classes[8] == "cat" and len(manifest.tasks["scene"].classes) == 21
    mask = np.asarray(Image.open(io.BytesIO(read_back(tmp_path / "out", "val")[0]["scene.png"])))
    assert (mask[:3] == 8).all() and (mask[3] == 255).all() and not mask[4:].any()


def test_without_lists_splits_are_made_and_a_missing_mask_is_said(tmp_path: Path) -> None:
    src = source(tmp_path, lists=False)
    manifest = run("voc", tmp_path / "out", {"source": src, "categories": "objects"}, HERE)
    assert sum(split.num_samples for split in manifest.splits.values()) == 4
    with pytest.raises(UserError, match=r"d\.xml: expected its mask as SegmentationClass/d\.png"):
        run("voc", tmp_path / "masks", {"source": src, "masks": "scene"}, HERE)
    src = fill(tmp_path / "bad", {"e.xml": "<annotation/>"})
    with pytest.raises(UserError, match=r"e\.xml: expected <filename>, found none"):
        run("voc", tmp_path / "x", {"source": src, "categories": "c"}, HERE)


def test_vocs_files_in_folders_of_splits_are_not_mixed(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number, split in enumerate(("train", "train", "valid")):
        files[f"{split}/{number}.xml"] = xml(str(number), ("cat", (1, 1, 5, 6), 0))
        files[f"{split}/{number}.jpg"] = picture(number)
    settings = {"source": fill(tmp_path / "voc", files), "categories": "objects"}
    manifest = run("voc", tmp_path / "out", settings, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}
    assert "splits taken from the folders of the images" in manifest.notes


def test_names_in_vocs_lists_may_hold_blanks_and_images_without_xml_show_nothing(
    tmp_path: Path,
) -> None:
    files: dict[str, bytes | str] = {
        **{f"JPEGImages/{name}.jpg": picture(n) for n, name in enumerate(("p 1", "p 2", "p 3"))},
        "Annotations/p 1.xml": xml("p 1", ("cat", (1, 1, 5, 6), 0)),
        "ImageSets/Main/train.txt": "p 1  1\np 2\n",
        "ImageSets/Main/val.txt": "p 3 -1\n",
    }
    settings = {"source": fill(tmp_path / "voc", files), "categories": "objects"}
    manifest = run("voc", tmp_path / "out", settings, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}
    assert "images of lists without an XML file, as of nothing marked: 2 (p 2; p 3)" in manifest.notes
    fill(tmp_path / "voc", {"SegmentationClass/p 3.png": palette_mask()})
    with pytest.raises(UserError, match="p 3: expected its XML file beside its mask, found none"):
        run("voc", tmp_path / "x", settings, HERE)
    (tmp_path / "voc/Annotations/p 1.xml").unlink()
    with pytest.raises(UserError, match=r"are a table: `mtl prepare table .*/ImageSets/Main OUT --root"):
        run("voc", tmp_path / "y", {**settings, "categories": "", "masks": "scene"}, HERE)


def test_names_of_vocs_objects_that_differ_in_form_alone_are_one(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number, name in enumerate(("caf\u00e9", "cafe\u0301")):
        files |= {
            f"{number}.xml": xml(str(number), (name, (1, 1, 5, 6), 0)),
            f"{number}.jpg": picture(number),
        }
    settings = {"source": fill(tmp_path / "voc", files), "categories": "objects"}
    manifest = run("voc", tmp_path / "out", settings, HERE)
    assert manifest.tasks["objects"].classes == ("caf\u00e9",)
    assert any("texts that are one class" in note for note in manifest.notes)
