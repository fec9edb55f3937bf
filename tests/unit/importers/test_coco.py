"""COCO's files become labels, masks and boxes, every annotation accounted for."""

from __future__ import annotations

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
from mtl_dist.importers.outlines import Polygons, Runs
from tests.source_files import HERE, encoded, fill, labels, picture, read_back

TRIANGLE = [2.3, 1.1, 12.9, 4.2, 5.5, 11.8]


def png(seed: int) -> bytes:
    return picture(seed, format="PNG", size=(16, 12))


def annotation(number: int, image: int, category: int, **more: Any) -> dict[str, Any]:
    whole = {"segmentation": [[2, 2, 8, 2, 8, 6, 2, 6]], "bbox": [2, 2, 6, 4], "iscrowd": 0}
    return {"id": number, "image_id": image, "category_id": category, "area": 24, **whole, **more}


def crowd(number: int, image: int, category: int) -> dict[str, Any]:
    runs = {"size": [12, 16], "counts": [0, 12, 180]}  # the left column
    return annotation(number, image, category, segmentation=runs, bbox=[0, 0, 1, 12], iscrowd=1)


def instances(*annotations: dict[str, Any], images: int = 3) -> bytes:
    return json.dumps(
        {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": 16, "height": 12} for n in range(1, images + 1)
            ],
            "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "table"}],
            "annotations": list(annotations),
        }
    ).encode()


def source(tmp_path: Path, data: bytes, images: int = 3) -> Path:
    pictures = {f"images/{n}.png": png(n) for n in range(1, images + 1)}
    return fill(tmp_path / "coco", {"annotations/all.json": data, **pictures})


def mask_of(sample: dict[str, Any], task: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample[f"{task}.png"])))


def test_instances_become_labels_masks_and_boxes(tmp_path: Path) -> None:
    src = source(
        tmp_path,
        instances(
            annotation(1, 1, 7),
            annotation(2, 1, 3, segmentation=[[0, 0, 16, 0, 16, 12, 0, 12]], bbox=[0, 0, 16, 12]),
            crowd(3, 1, 7),
            annotation(4, 2, 7, segmentation=[], bbox=[4, 4, 4, 4]),
            annotation(5, 99, 7),
        ),
    )
    settings = {"source": src, "categories": "objects", "masks": "scene", "box": {"cup": "cup"}}
    manifest = run("coco", tmp_path / "out", {**settings}, HERE)
    assert manifest.tasks["objects"].classes == ("table", "cup")
    assert manifest.tasks["scene"].classes == ("background", "table", "cup")
    samples = {s["__key__"]: s for split in manifest.splits for s in read_back(tmp_path / "out", split)}
    labels = {key: json.loads(sample["json"]) for key, sample in samples.items()}
    assert labels["1"] == {
        "objects": [0, 1],
        "cup_xmin": 2.0,
        "cup_ymin": 2.0,
        "cup_xmax": 8.0,
        "cup_ymax": 6.0,
    }
    assert (labels["2"]["objects"], labels["3"]) == ([1], {"objects": []})
    first, second, third = (mask_of(samples[key], "scene") for key in "123")
    assert (first[2:6, 2:8] == 2).all() and (first == 1).sum() == 16 * 12 - 24  # the cup lies on the table
    assert (second[4:8, 4:8] == 255).all() and (second != 0).sum() == 16  # a box without an outline
    assert not third.any()
    assert manifest.account["regions"] == {
        "label": 3,
        "label: a crowd": 1,
        "left out: its image is not in the file": 1,
    }
    assert manifest.account["files"] == {"image": 3, "table": 1}
    said = "\n".join(manifest.notes)
    assert "images without regions: 1, they show none" in said
    assert "crowds whose pixels are ignored in masks (--crowds): 1" in said
    assert "regions without an outline, whose boxes are ignored in masks: 1" in said


def test_a_crowd_without_others_is_ignored_and_never_a_class(tmp_path: Path) -> None:
    src = source(tmp_path, instances(crowd(1, 1, 7), annotation(2, 2, 3)))
    run("coco", tmp_path / "out", {"source": src, "masks": "scene"}, HERE)
    run("coco", tmp_path / "class", {"source": src, "masks": "scene", "crowds": "class"}, HERE)
    for out, value in (("out", 255), ("class", 2)):
        found = [s for split in ("train", "val", "test") for s in _split(tmp_path / out, split)]
        (mask,) = [mask_of(sample, "scene") for sample in found if sample["__key__"] == "1"]
        assert (mask[:, 0] == value).all() and not mask[:, 1:].any()


def _split(out: Path, split: str) -> list[dict[str, Any]]:
    return read_back(out, split) if list(out.glob(f"{split}-*.tar")) else []


def test_the_largest_region_is_the_box_and_the_others_are_counted(tmp_path: Path) -> None:
    src = source(
        tmp_path,
        instances(
            annotation(1, 1, 7, bbox=[1, 1, 2, 2]),
            annotation(2, 1, 7, bbox=[0, 0, 9, 9]),
            annotation(3, 2, 7, bbox=[0, 0, 0, 5]),
            annotation(4, 3, 3),
        ),
    )
    manifest = run("coco", tmp_path / "out", {"source": src, "box": {"cup": "cup"}}, HERE)
    assert manifest.account["regions"] == {
        "label": 1,
        "left out: not the largest of its category in its image": 1,
        "left out: a box without extent": 1,
        "left out: no task is made of it": 1,
    }


def test_files_of_splits_keep_their_splits(tmp_path: Path) -> None:
    files = {
        "annotations/instances_train2017.json": instances(annotation(1, 1, 7), images=2),
        "annotations/instances_val2017.json": instances(annotation(1, 1, 3), images=1),
        "annotations/captions_train2017.json": b'{"images": [], "annotations": []}',
        "train2017/1.png": png(1),
        "train2017/2.png": png(2),
        "val2017/1.png": png(3),
        "val2017/stray.png": png(4),
    }
    src = fill(tmp_path / "coco", files)
    manifest = run("coco", tmp_path / "out", {"source": src, "categories": "objects"}, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}
    assert manifest.account["files"] == {
        "image": 3,
        "table": 2,
        "left out: no annotation names it": 1,
        "left out: no image by its name": 1,
    }


def test_panoptic_pictures_become_masks(tmp_path: Path) -> None:
    ids = np.zeros((12, 16), np.uint32)
    ids[:6], ids[6:, :8] = 300, 70_000
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(colours).save(png, "PNG")
    segments = [{"id": 300, "category_id": 7}, {"id": 70_000, "category_id": 3}]
    data = json.loads(instances(images=2))
    data["annotations"] = [
        {"image_id": n, "file_name": f"{n}.png", "segments_info": segments} for n in (1, 2)
    ]
    files = {
        "panoptic.json": json.dumps(data).encode(),
        **{f"panoptic/{n}.png": png.getvalue() for n in (1, 2)},
        **{f"images/{n}.jpg": picture(n, size=(16, 12)) for n in (1, 2)},
    }
    for image in data["images"]:
        image["file_name"] = image["file_name"].replace("png", "jpg")
    files["panoptic.json"] = json.dumps(data).encode()
    src = fill(tmp_path / "coco", files)
    manifest = run("coco", tmp_path / "out", {"source": src, "masks": "scene"}, HERE)
    assert manifest.tasks["scene"].classes == ("table", "cup")
    mask = mask_of(_split(tmp_path / "out", "train")[0], "scene")
    assert (mask[:6] == 1).all() and (mask[6:, :8] == 0).all() and (mask[6:, 8:] == 255).all()
    assert manifest.account["files"] == {"image": 2, "mask": 2, "table": 1}
    assert manifest.account["regions"] == {"label": 4}


def test_panoptic_pictures_are_not_taken_for_images_of_the_same_name(tmp_path: Path) -> None:
    segments = np.zeros((12, 16, 3), np.uint8)
    segments[..., 0] = 5
    files: dict[str, bytes] = {}
    for split, number in (("train", 1), ("val", 2)):
        data = json.loads(instances(images=2))
        data["images"] = [image for image in data["images"] if image["id"] == number]
        data["annotations"] = [
            {"image_id": number, "file_name": f"{number}.png", "segments_info": [{"id": 5, "category_id": 7}]}
        ]
        files[f"annotations/panoptic_{split}.json"] = json.dumps(data).encode()
        files[f"annotations/panoptic_{split}/{number}.png"] = encoded(Image.fromarray(segments))
        files[f"images/{split}/{number}.png"] = picture(number, format="PNG", size=(16, 12))
    src = fill(tmp_path / "coco", files)
    manifest = run("coco", tmp_path / "out", {"source": src, "masks": "scene"}, HERE)
    assert manifest.account["files"] == {"image": 2, "mask": 2, "table": 2}
    (sample,) = _split(tmp_path / "out", "train")
    assert sample["png"] == files["images/train/1.png"]
    (src / "images/train/1.png").unlink()
    with pytest.raises(UserError, match=r"expected '1.png' and its segments in two files, found .* alone"):
        run("coco", tmp_path / "x", {"source": src, "masks": "scene"}, HERE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
def test_outlines_are_filled_as_pycocotools_fills_them() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    height, width = 23, 31
    for points in [TRIANGLE, *(rng.uniform(-4, 36, 2 * n).tolist() for n in rng.integers(3, 12, 60))]:
        runs = tools.frPyObjects([points], height, width)
        (theirs,) = np.moveaxis(tools.decode(runs), -1, 0)
        assert np.array_equal(Polygons((tuple(points),)).inside(height, width), theirs.astype(bool))
        packed = Runs(runs[0]["counts"].decode(), height, width).inside(height, width)
        assert np.array_equal(packed, theirs.astype(bool))


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [
        ({}, {}, "--categories NAME, --masks NAME or --box"),
        ({}, {"box": {"cup": "cupp"}}, "Did you mean 'cup'"),
        ({"category_id": 5}, {"masks": "m"}, "annotation 1: expected a category of the file, found the id 5"),
        ({"segmentation": [[1, 2, 3]]}, {"masks": "m"}, "polygons of three points or more"),
        ({"segmentation": []}, {"masks": "m"}, "regions with outlines, found boxes alone"),
        ({"segmentation": {"size": [12, 16], "counts": [5]}}, {"masks": "m"}, "1.png: run lengths: expected"),
        ({"bbox": [1, 2]}, {"categories": "c"}, "bbox: expected 4 numbers"),
        ({"iscrowd": "0"}, {"masks": "m"}, "expected 'iscrowd' to be 0 or 1, found '0'"),
        (
            {"image_id": "1"},
            {"masks": "m"},
            "expected image_id as the images have their ids, found '1', a str",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], match: str
) -> None:
    src = source(tmp_path, instances(annotation(1, 1, 7, **change)))
    with pytest.raises(UserError, match=match) as caught:
        run("coco", tmp_path / "out", {"source": src, **settings}, HERE)
    assert "\n" not in str(caught.value)


def poses(*annotations: dict[str, Any]) -> bytes:
    data = json.loads(instances(*annotations))
    data["categories"][0] |= {"keypoints": ["rim", "left_foot", "right_foot"], "skeleton": [[1, 2], [1, 3]]}
    return json.dumps(data).encode()


def posed(number: int, image: int, points: list[float], wide: float = 6, **more: Any) -> dict[str, Any]:
    found = sum(visibility > 0 for visibility in points[2::3])
    own = {"keypoints": points, "num_keypoints": found, "bbox": [2, 2, wide, 4]}
    return annotation(number, image, 7, **own, **more)


THREE = [2.5, 3, 2, 4, 5, 1, 0, 0, 0]
SMALL = [1, 1, 2, 1, 2, 2, 3, 3, 2]


def counted(manifest: Manifest, task: str) -> list[int]:
    """How often each point occurs, over all splits."""
    return np.sum([split.labels[task].class_counts for split in manifest.splits.values()], axis=0).tolist()


def test_points_of_instances_become_a_task(tmp_path: Path) -> None:
    data = poses(
        posed(1, 1, THREE), posed(2, 2, [0] * 9), annotation(3, 3, 3), posed(4, 3, [99, 3, 2, *SMALL[3:]])
    )
    manifest = run(
        "coco", tmp_path / "out", {"source": source(tmp_path, data), "points": {"cup": "cup"}}, HERE
    )
    info = manifest.tasks["cup"]
    assert info.classes == ("rim", "left_foot", "right_foot")
    assert counted(manifest, "cup") == [1, 2, 1]
    assert info.facts["skeleton"] == [["rim", "left_foot"], ["rim", "right_foot"]]
    found = [of_image.get("cup", {}) for of_image in labels(tmp_path / "out").values()]
    assert sorted(label.get("points", []) for label in found) == sorted(
        [[], [[2.5, 3, 2], [4, 5, 1], [0, 0, 0]], [[0, 0, 0], [1, 2, 2], [3, 3, 2]]]
    )
    assert "cup: points outside of their image, taken as missing: 1" in manifest.notes
    assert manifest.account["regions"] == {
        "label": 2,
        "left out: none of its points is labelled": 1,
        "left out: no task is made of it": 1,
    }


def test_the_points_of_several_instances_are_refused_unless_the_largest_is_asked_for(tmp_path: Path) -> None:
    src = source(tmp_path, poses(posed(1, 1, SMALL, wide=2), posed(2, 1, THREE)))
    with pytest.raises(UserError, match="image 1: expected the points of one cup, found those of 2"):
        run("coco", tmp_path / "out", {"source": src, "points": {"cup": "cup"}}, HERE)
    manifest = run(
        "coco", tmp_path / "out", {"source": src, "points": {"cup": "cup"}, "several": "largest"}, HERE
    )
    assert counted(manifest, "cup") == [1, 1, 0]
    assert "images with the points of several cup, whose largest is cup: 1" in manifest.notes
    assert manifest.account["regions"]["left out: not the largest of its category in its image"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoints": [1, 2, 2]}, "annotation 1, keypoints: expected 9 numbers"),
        ({"keypoints": [1, 2, 5] * 3}, "expected visibility 0, 1 or 2 of each point"),
        ({"num_keypoints": 1}, "expected 1 labelled points .num_keypoints., found 2"),
    ],
)
def test_points_that_are_none_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    src = source(tmp_path, poses(posed(1, 1, THREE) | change))
    with pytest.raises(UserError, match=message):
        run("coco", tmp_path / "out", {"source": src, "points": {"cup": "cup"}}, HERE)
    with pytest.raises(UserError, match=r"expected a category with points \(cup\), found 'table'"):
        run(
            "coco",
            tmp_path / "out",
            {"source": source(tmp_path / "b", poses()), "points": {"it": "table"}},
            HERE,
        )


def test_one_file_of_images_in_folders_of_splits_is_not_divided_anew(tmp_path: Path) -> None:
    names = ("train2017/0.jpg", "train2017/1.jpg", "val2017/2.jpg")
    content = {
        "images": [{"id": n, "file_name": name, "width": 10, "height": 12} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [],
    }
    files: dict[str, bytes | str] = {name: picture(n) for n, name in enumerate(names)}
    src = fill(tmp_path / "src", {**files, "all.json": json.dumps(content)})
    manifest = run("coco", tmp_path / "out", {"source": src, "categories": "objects"}, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}


def test_an_annotation_that_comes_twice_is_counted_twice_and_a_category_has_a_name(tmp_path: Path) -> None:
    data = instances(annotation(1, 1, 7), annotation(1, 1, 7))
    manifest = run("coco", tmp_path / "out", {"source": source(tmp_path, data), "categories": "c"}, HERE)
    assert manifest.account["regions"] == {"label": 2}
    nameless = json.loads(data)
    nameless["categories"][0]["name"] = " "
    src = source(tmp_path / "nameless", json.dumps(nameless).encode())
    with pytest.raises(UserError, match=r"expected a name of the category \d+, found none"):
        run("coco", tmp_path / "x", {"source": src, "categories": "c"}, HERE)
