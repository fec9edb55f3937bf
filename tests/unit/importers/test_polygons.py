"""YOLO's, LabelMe's and CVAT's files become labels, masks and boxes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtl_dist.data.manifest import Manifest
from mtl_dist.errors import UserError
from mtl_dist.importers import run
from tests.source_files import HERE, encoded, fill, labels, picture, read_back

WIDTH, HEIGHT = 20, 10
SIZE = (WIDTH, HEIGHT)
ALL = {"categories": "shown", "masks": "scene", "box": {"cat": "cat"}}


def made(importer: str, src: Path, out: Path, **settings: Any) -> Manifest:
    return run(importer, out, {"source": src, **(settings or ALL)}, HERE)


def masks(out: Path, split: str = "train") -> dict[str, np.ndarray]:
    return {
        sample["__key__"]: np.asarray(Image.open(io.BytesIO(sample["scene.png"])))
        for sample in read_back(out, split)
    }


def rectangle(value: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    found[top:bottom, left:right] = value
    return found


# ---------------------------------------------------------------- YOLO
def share(*pixels: float) -> str:
    return " ".join(str(each / (WIDTH, HEIGHT)[n % 2]) for n, each in enumerate(pixels))


POLYGONS = {
    "data.yaml": "path: ../yolo\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n",
    "images/train/a.jpg": picture(1, size=SIZE),
    "images/train/b.jpg": picture(2, size=SIZE),
    "images/val/c.jpg": picture(3, size=SIZE),
    "labels/train/a.txt": f"0 {share(0, 0, 10, 0, 10, 5, 0, 5)}\n1 {share(12, 2, 16, 2, 16, 8, 12, 8)}\n",
    "labels/val/c.txt": f"1 {share(0, 0, 10, 0, 10, 5, 0, 5)}\n",
    "README.txt": "about it",
}
BOXES = {
    **POLYGONS,
    "labels/train/a.txt": f"0 {share(5, 2.5, 10, 5)}\n1 {share(14, 5, 4, 6)}\n",
    "labels/val/c.txt": f"1 {share(5, 2.5, 10, 5)}\n",
}


@pytest.mark.parametrize("files", [POLYGONS, BOXES], ids=["polygons", "boxes"])
def test_yolo_becomes_categories_and_boxes_in_its_splits(tmp_path: Path, files: dict[str, Any]) -> None:
    settings = {"categories": "shown", "box": {"cat": "cat"}}
    manifest = made("yolo", fill(tmp_path / "yolo", files), tmp_path / "out", **settings)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}
    assert manifest.tasks["shown"].classes == ("cat", "dog")
    found = labels(tmp_path / "out")
    assert {key: each["shown"] for key, each in found.items()} == {"a": [0, 1], "b": [], "c": [1]}
    assert [found["a"][f"cat_{side}"] for side in ("xmin", "ymin", "xmax", "ymax")] == pytest.approx(
        [0, 0, 10, 5]
    )
    assert manifest.account["regions"] == {"label": 3}
    assert sum(manifest.account["files"].values()) == len(files)


def test_yolos_polygons_become_masks(tmp_path: Path) -> None:
    made("yolo", fill(tmp_path / "yolo", POLYGONS), tmp_path / "out", masks="scene")
    found = masks(tmp_path / "out")
    assert np.array_equal(found["a"], rectangle(1, 0, 0, 10, 5) + rectangle(2, 12, 2, 16, 8))
    assert not found["b"].any()
    with pytest.raises(UserError, match="expected regions with outlines, found boxes alone"):
        made("yolo", fill(tmp_path / "boxes", BOXES), tmp_path / "no", masks="scene")


def test_yolo_without_settings_has_its_classes_and_splits_beside(tmp_path: Path) -> None:
    files = {
        "classes.txt": "cat\ndog\n",
        "train/images/a.jpg": picture(1),
        "train/labels/a.txt": "0 0.5 0.5 0.5 0.5\n",
        "valid/images/b.jpg": picture(2),
        "valid/labels/b.txt": "1 0.5 0.5 0.5 0.5\n",
    }
    manifest = made("yolo", fill(tmp_path / "in", files), tmp_path / "out", categories="shown")
    assert list(manifest.splits) == ["train", "val"]
    del files["classes.txt"]
    with pytest.raises(UserError, match=r"expected class names in data.yaml or classes.txt, found neither"):
        made("yolo", fill(tmp_path / "bare", files), tmp_path / "no", categories="shown")
    made("yolo", tmp_path / "bare", tmp_path / "named", categories="shown", classes=["x", "y"])
    lists = {"train.txt": "./a.jpg\n", "val.txt": "data/obj/b.jpg\n", "obj.names": "cat\ndog\n"}
    beside = {
        "a.jpg": picture(1),
        "a.txt": "0 0.5 0.5 1 1\n",
        "b.jpg": picture(2),
        "b.txt": "1 0.5 0.5 1 1\n",
    }
    manifest = made(
        "yolo", fill(tmp_path / "darknet", {**lists, **beside}), tmp_path / "d", categories="shown"
    )
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 10 2 4 6", "expected shares of the image from 0 to 1, found '10 2 4 6'"),
        ("7 0.1 0.1 0.1 0.1", "expected a class from 0 to 1 first, found '7'"),
        ("0 0.5 0.5 0.1 0.1 0.9", r"expected a box \(4 numbers\) or a polygon .* found 5"),
    ],
)
def test_what_is_no_line_of_yolo_is_refused_by_its_place(tmp_path: Path, line: str, said: str) -> None:
    src = fill(tmp_path / "yolo", {**BOXES, "labels/train/a.txt": f"\n{line}\n"})
    with pytest.raises(UserError, match=rf"labels/train/a.txt line 2: {said}"):
        made("yolo", src, tmp_path / "out", categories="shown")
    src = fill(tmp_path / "lost", {**BOXES, "labels/train/z.txt": "0 0.5 0.5 0.1 0.1\n"})
    with pytest.raises(UserError, match="expected an image for each text file of labels, found none for 1"):
        made("yolo", src, tmp_path / "out", categories="shown")


# ---------------------------------------------------------------- LabelMe
def labelme(name: str, *shapes: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {"group_id": None, "description": "", "flags": {}, "mask": None, **each} for each in shapes
        ],
        "imagePath": f"..\\photos\\{name}.jpg",
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }


def shape(label: str, kind: str, *points: float, **more: Any) -> dict[str, Any]:
    pairs = [list(points[n : n + 2]) for n in range(0, len(points), 2)]
    return {"label": label, "shape_type": kind, "points": pairs, **more}


def test_labelmes_shapes_become_masks_boxes_and_categories(tmp_path: Path) -> None:
    bits = base64.b64encode(encoded(Image.fromarray(np.full((3, 2), 255, np.uint8)))).decode()
    files = {
        "json/a.json": labelme(
            "a", shape("cat", "polygon", 0, 0, 10, 0, 10, 5, 0, 5), shape("dog", "rectangle", 16, 8, 12, 2)
        ),
        "json/b.json": labelme("b", shape("dog", "mask", 3, 4, 4, 6, mask=bits), shape("cat", "point", 1, 1)),
        "json/c.json": labelme("c", shape("cat", "circle", 10, 5, 14, 5)),
        "json/other.json": {"no": "shapes"},
        **{f"photos/{name}.jpg": picture(n, size=SIZE) for n, name in enumerate("abcd")},
    }
    src = fill(tmp_path / "in", files)
    run("labelme", tmp_path / "out", {"source": src, **ALL}, HERE)
    made_masks = {
        key: mask for split in ("train", "val") for key, mask in masks(tmp_path / "out", split).items()
    }
    assert np.array_equal(made_masks["a"], rectangle(1, 0, 0, 10, 5) + rectangle(2, 12, 2, 16, 8))
    assert np.array_equal(made_masks["b"], rectangle(2, 3, 4, 5, 7))
    ys, xs = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert np.array_equal(made_masks["c"] == 1, (xs - 10) ** 2 + (ys - 5) ** 2 <= 16)
    found = labels(tmp_path / "out")
    assert {key: each["shown"] for key, each in found.items()} == {"a": [0, 1], "b": [0, 1], "c": [0]}
    assert [found["c"][f"cat_{side}"] for side in ("xmin", "ymin", "xmax", "ymax")] == [6, 1, 14, 9]
    manifest = made("labelme", src, tmp_path / "masks", masks="scene")
    assert manifest.account["regions"] == {"label": 4, "left out: a point or a line, which has no area": 1}
    assert manifest.account["files"]["left out: no annotation names it"] == 1
    with pytest.raises(UserError, match=r"expected all labels of regions \(cat\), found dog too"):
        made("labelme", src, tmp_path / "no", masks="scene", classes=["cat"])


# ---------------------------------------------------------------- CVAT
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><job><labels><label><name>dog</name></label><label><name>cat</name></label></labels></job></meta>
<image id="0" name="train/a.jpg" subset="Train" width="20" height="10">
 <polygon label="cat" source="manual" occluded="0" points="0,0;10,0;10,5;0,5" z_order="0"></polygon>
 <box label="dog" occluded="0" xtl="12" ytl="2" xbr="16" ybr="8" z_order="0"></box>
</image>
<image id="1" name="train/b.jpg" subset="Train" width="20" height="10">
 <mask label="dog" rle="0, 5, 1" left="3" top="4" width="2" height="3" z_order="0"></mask>
 <tag label="cat"></tag>
</image>
<image id="2" name="c.jpg" subset="Validation" width="20" height="10">
 <ellipse label="cat" cx="10" cy="5" rx="4" ry="2" z_order="0"></ellipse>
 <polyline label="dog" points="1,1;5,5"></polyline>
</image>
</annotations>"""


def test_cvats_shapes_become_masks_boxes_and_categories(tmp_path: Path) -> None:
    photos = {
        f"images/{name}": picture(n, size=SIZE)
        for n, name in enumerate(("train/a.jpg", "train/b.jpg", "c.jpg"))
    }
    src = fill(tmp_path / "in", {"annotations.xml": CVAT, **photos})
    manifest = made("cvat", src, tmp_path / "out")
    assert manifest.tasks["shown"].classes == ("dog", "cat")
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}
    found = masks(tmp_path / "out")
    assert np.array_equal(found["a"], rectangle(2, 0, 0, 10, 5) + rectangle(1, 12, 2, 16, 8))
    assert np.array_equal(found["b"], rectangle(1, 3, 4, 5, 7) - rectangle(1, 4, 6, 5, 7))
    (ellipse,) = masks(tmp_path / "out", "val").values()
    ys, xs = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert np.array_equal(ellipse == 2, ((xs - 10) / 4) ** 2 + ((ys - 5) / 2) ** 2 <= 1)
    shown = {key: each["shown"] for key, each in labels(tmp_path / "out").items()}
    assert shown == {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    assert manifest.account["regions"] == {"label": 6}
    src = fill(tmp_path / "video", {"annotations.xml": "<annotations><track/></annotations>", **photos})
    with pytest.raises(UserError, match="found tracks of a video"):
        made("cvat", src, tmp_path / "no")


def test_a_turn_of_cvat_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    for number, turn in enumerate(("ninety", "nan", "")):
        turned = CVAT.replace('ybr="8" z_order="0"', f'ybr="8" rotation="{turn}" z_order="0"')
        src = fill(tmp_path / str(number), {"annotations.xml": turned})
        with pytest.raises(UserError, match=f"expected a number as 'rotation', found '{turn}'"):
            made("cvat", src, tmp_path / "no")


def test_a_turned_box_of_cvat_is_turned(tmp_path: Path) -> None:
    turned = CVAT.replace('ybr="8" z_order="0"', 'ybr="8" rotation="90" z_order="0"')
    photos = {
        f"images/{name}": picture(n, size=SIZE)
        for n, name in enumerate(("train/a.jpg", "train/b.jpg", "c.jpg"))
    }
    made(
        "cvat", fill(tmp_path / "in", {"annotations.xml": turned, **photos}), tmp_path / "out", masks="scene"
    )
    assert np.array_equal(masks(tmp_path / "out")["a"] == 1, rectangle(1, 11, 3, 17, 7) == 1)


def test_labels_of_labelme_that_differ_in_form_alone_are_one(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number, label in enumerate(("caf\u00e9", "cafe\u0301 ", "tea")):
        shape = {"label": label, "points": [[1, 1], [5, 5]], "shape_type": "rectangle"}
        files[f"{number}.jpg"] = picture(number)
        files[f"{number}.json"] = json.dumps(
            {"imagePath": f"{number}.jpg", "imageHeight": 12, "imageWidth": 10, "shapes": [shape]}
        )
    settings = {"source": fill(tmp_path / "src", files), "categories": "objects"}
    manifest = run("labelme", tmp_path / "out", settings, HERE)
    assert manifest.tasks["objects"].classes == ("café", "tea")
    assert any("labels: texts that are one class, 'café'" in note for note in manifest.notes)


def test_cvats_files_for_splits_and_labelmes_folders_of_annotations_are_not_mixed(tmp_path: Path) -> None:
    cvat: dict[str, Any] = {}
    jsons: dict[str, Any] = {}
    for number, split in enumerate(("train", "train", "val")):
        cvat[f"images/{number}.jpg"] = jsons[f"images/{number}.jpg"] = picture(number, size=SIZE)
        shape = {"label": "cat", "points": [[1, 1], [5, 5]], "shape_type": "rectangle"}
        jsons[f"json/{split}/{number}.json"] = {
            "imagePath": f"{number}.jpg",
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
            "shapes": [shape],
        }
        of_split = cvat.get(f"{split}.xml", "<annotations></annotations>")
        name = ("caf\u00e9", "cafe\u0301")[number % 2]
        image = f'''<image name="{number}.jpg" width="20" height="10"><tag label="{name}"/></image>'''
        cvat[f"{split}.xml"] = of_split.replace("</ann", f"{image}</ann")
    for importer, files in (("cvat", cvat), ("labelme", jsons)):
        manifest = made(
            importer, fill(tmp_path / importer, files), tmp_path / f"{importer}-out", categories="c"
        )
        found = {name: split.num_samples for name, split in manifest.splits.items()}
        assert found == {"train": 2, "val": 1}, importer
        assert "splits taken from the folders of the annotations" in manifest.notes
        assert len(manifest.tasks["c"].classes) == 1


def test_names_of_yolo_are_texts_and_its_lists_have_no_gaps(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "data.yaml": "names: [no, 1.0, 1e5, 0x10]\n",
        **{f"images/{n}.jpg": picture(n, size=SIZE) for n in range(4)},
        **{f"labels/{n}.txt": f"{n} 0.5 0.5 0.2 0.2" for n in range(4)},
    }
    manifest = made("yolo", fill(tmp_path / "in", files), tmp_path / "out", categories="c")
    assert manifest.tasks["c"].classes == ("no", "1.0", "1e5", "0x10")
    files.pop("data.yaml")
    for lists, said in (
        ({"classes.txt": "a\n\nb\nc\nd\n"}, "expected a class name on each line, found an empty line 2"),
        ({"classes.txt": "a\nb\nc\nd\n", "obj.names": "b\na\nc\nd\n"}, "expected the same class names in"),
    ):
        src = fill(tmp_path / str(len(lists)), {**files, **lists})
        with pytest.raises(UserError, match=said):
            made("yolo", src, tmp_path / "x", categories="c")


def test_a_box_without_extent_is_said(tmp_path: Path) -> None:
    flat = CVAT.replace('ybr="8" z_order', 'ybr="2" z_order')
    names = ("train/a.jpg", "train/b.jpg", "c.jpg")
    photos = {f"images/{name}": picture(n, size=SIZE) for n, name in enumerate(names)}
    src = fill(tmp_path / "in", {"annotations.xml": flat, **photos})
    manifest = made("cvat", src, tmp_path / "out", categories="c", box={"dog": "dog"})
    assert "regions of dog without extent, which are no box dog: 2" in manifest.notes
