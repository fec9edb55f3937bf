"""The data sets of the multi-task field in the layouts in which everybody has them."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_dist.errors import UserError
from mtl_dist.importers import run
from mtl_dist.importers.options import PackOptions
from tests.source_files import HERE, fill, labels, picture, read_back


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def mtan(tmp_path: Path, **changed: np.ndarray) -> Path:
    """Two training pictures and one to validate on, as MTAN's archives have them."""
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for split, numbers in (("train", (0, 1)), ("val", (0,))):
        for number in numbers:
            classes = rng.integers(0, 13, (12, 16)).astype(np.float32)
            classes[:2] = -1
            depth = rng.uniform(0.5, 8, (12, 16, 1)).astype(np.float32)
            depth[0] = 0
            normal = rng.normal(size=(12, 16, 3))
            normal /= np.linalg.norm(normal, axis=2, keepdims=True)
            normal[0] = 0
            arrays = {
                "image": rng.uniform(0, 1, (12, 16, 3)).astype(np.float32),
                "label": classes,
                "depth": depth,
                "normal": normal.astype(np.float32),
            }
            for folder, array in {**arrays, **changed}.items():
                files[f"{split}/{folder}/{number}.npy"] = npy(array)
    return fill(tmp_path / "nyuv2", files)


def test_nyuv2_as_mtan_has_it_keeps_its_splits_and_what_has_no_label(tmp_path: Path) -> None:
    source = mtan(tmp_path)
    settings = {"source": source, "classes": ("nyuv2",), "unit": "m", "metric": True}
    manifest = run("mtan", tmp_path / "out", settings, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 2, "val": 1}
    assert {task: info.kind for task, info in manifest.tasks.items()} == {
        "semantic": "segmentation",
        "depth": "depth",
        "normal": "normals",
    }
    assert manifest.tasks["semantic"].classes[:2] == ("bed", "books")
    assert len(manifest.tasks["semantic"].classes) == 13
    samples = {sample["__key__"]: sample for sample in read_back(tmp_path / "out", "train")}
    first = samples["train_1"]
    stored = np.asarray(Image.open(io.BytesIO(first["semantic.png"])))
    classes = np.load(source / "train/label/1.npy")
    assert (stored == np.where(classes < 0, 255, classes)).all()
    image = np.load(source / "train/image/1.npy")
    assert np.abs(np.asarray(Image.open(io.BytesIO(first["png"]))) / 255 - image).max() <= 0.5 / 255 + 1e-6
    assert (np.load(io.BytesIO(first["normal.npy"])) == np.load(source / "train/normal/1.npy")).all()
    there = 3 * 11 * 16
    assert manifest.tasks["depth"].facts["pixels"] == 2 * there / 3
    assert manifest.account["files"]["image"] == 3
    assert manifest.account["files"]["mask"] == 9


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label": np.full((12, 16), 2.5)}, "expected classes from 0 to 254"),
        ({"label": np.zeros((2, 12, 16))}, r"expected classes \(H, W\)"),
        ({"label": np.full((12, 16), 13)}, "a name for each class up to 13"),
        ({"image": np.full((12, 16, 3), 200.0)}, "expected values from 0 to 1"),
        ({"image": np.full((12, 16, 3), np.nan)}, "expected values from 0 to 1"),
        ({"image": np.zeros((12, 16))}, r"expected an image \(H, W, 3\)"),
    ],
)
def test_arrays_that_are_something_else_are_named(
    changed: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    settings = {"source": mtan(tmp_path, **changed), "classes": ("nyuv2",)}
    with pytest.raises(UserError, match=words):
        run("mtan", tmp_path / "out", settings, HERE)


def test_classes_without_names_are_numbers_and_a_map_without_its_image_is_refused(tmp_path: Path) -> None:
    source = mtan(tmp_path, label=np.full((12, 16), 6))
    manifest = run("mtan", tmp_path / "out", {"source": source}, HERE)
    assert manifest.tasks["semantic"].classes == tuple("0123456")
    (source / "train/image/1.npy").unlink()
    with pytest.raises(UserError, match="an image for each map of depth"):
        run("mtan", tmp_path / "other", {"source": source}, HERE)


def test_folders_of_classes_by_another_name_are_asked_for(tmp_path: Path) -> None:
    source = mtan(tmp_path)
    for split in ("train", "val"):
        (source / split / "label").rename(source / split / "label_7")
    with pytest.raises(
        UserError, match=r"expected a folder label of classes .* found label_7.*--label label_7"
    ):
        run("mtan", tmp_path / "out", {"source": source}, HERE)
    manifest = run("mtan", tmp_path / "out", {"source": source, "label": "label_7"}, HERE)
    assert "semantic" in manifest.tasks


ATTRIBUTES = """4
Bald Smiling Young
000001.jpg -1  1  1
000002.jpg  1 -1 -1
000003.jpg -1 -1  1
000004.jpg -1 -1 -1
"""
PARTITION = "000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n"


def celeba(tmp_path: Path, attributes: str = ATTRIBUTES, partition: str = PARTITION) -> Path:
    images = {f"img_align_celeba/00000{number}.jpg": picture(number) for number in range(1, 5)}
    lists = {"list_attr_celeba.txt": attributes, "list_eval_partition.txt": partition}
    return fill(tmp_path / "celeba", {**images, **lists})


def test_celeba_is_a_task_for_each_attribute_in_its_own_splits(tmp_path: Path) -> None:
    manifest = run("celeba", tmp_path / "out", {"source": celeba(tmp_path)}, HERE)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    assert set(manifest.tasks) == {"Bald", "Smiling", "Young"}
    assert labels(tmp_path / "out")["000001"] == {"Bald": 0, "Smiling": 1, "Young": 1}


def test_an_attribute_of_celeba_that_starts_with_a_digit_is_a_task_all_the_same(tmp_path: Path) -> None:
    source = celeba(tmp_path, ATTRIBUTES.replace("Bald", "5_o_Clock_Shadow"))
    manifest = run("celeba", tmp_path / "out", {"source": source}, HERE)
    assert set(manifest.tasks) == {"is_5_o_Clock_Shadow", "Smiling", "Young"}
    assert any("5_o_Clock_Shadow is the task is_5_o_Clock_Shadow" in note for note in manifest.notes)
    assert labels(tmp_path / "out")["000001"]["is_5_o_Clock_Shadow"] == 0


def test_the_landmarks_of_celeba_are_a_task_beside_its_attributes(tmp_path: Path) -> None:
    source = celeba(tmp_path)
    columns = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y"
    lines = [f"00000{number}.jpg  {number} 2 3   4 5 6" for number in range(1, 5)]
    file = source / "list_landmarks_align_celeba.txt"
    file.write_text("\n".join(["4", columns, *lines]))
    manifest = run("celeba", tmp_path / "out", {"source": source, "landmarks": "face"}, HERE)
    assert manifest.tasks["face"].classes == ("lefteye", "righteye", "nose")
    assert labels(tmp_path / "out")["000003"]["face"]["points"] == [[3, 2, 2], [3, 4, 2], [5, 6, 2]]
    file.write_text("\n".join(["4", columns, *lines[:3], "000004.jpg 1 2"]))
    with pytest.raises(UserError, match="expected 6 numbers for 000004"):
        run("celeba", tmp_path / "again", {"source": source, "landmarks": "face"}, HERE)


def test_celeba_is_one_multilabel_task_where_that_is_wanted(tmp_path: Path) -> None:
    settings = {"source": celeba(tmp_path), "attributes_as": "one", "attributes": ("Bald", "Young")}
    run("celeba", tmp_path / "out", settings, HERE)
    assert labels(tmp_path / "out") == {
        "000001": {"attributes": [1]},
        "000002": {"attributes": [0]},
        "000003": {"attributes": [1]},
        "000004": {"attributes": []},
    }


@pytest.mark.parametrize(
    ("attributes", "partition", "words"),
    [
        (ATTRIBUTES.replace("-1 -1 -1", "-1 -1"), PARTITION, "expected 3 values of 1 or -1 for 000004.jpg"),
        (ATTRIBUTES.replace("1  1", "7  1"), PARTITION, "expected 3 values"),
        (ATTRIBUTES + "000009.jpg 1 1 1\n", PARTITION + "000009.jpg 0\n", "found none for 1 of 5"),
        (ATTRIBUTES, PARTITION[:-13], "expected the split of each image"),
        (ATTRIBUTES, PARTITION.replace(" 2", " 3"), "an image and 0, 1 or 2"),
    ],
)
def test_lists_of_celeba_that_do_not_fit_are_named(
    attributes: str, partition: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        run("celeba", tmp_path / "out", {"source": celeba(tmp_path, attributes, partition)}, HERE)


@pytest.mark.parametrize("between", ["", "images/"])
def test_each_domain_of_office_is_a_task_over_its_own_pictures(between: str, tmp_path: Path) -> None:
    names = [("amazon", "bike"), ("amazon", "mug"), ("Real World", "bike"), ("Real World", "pen")]
    files = {
        f"{domain}/{between}{name}/{number}.jpg": picture(10 * place + number)
        for place, (domain, name) in enumerate(names)
        for number in range(3)
    }
    manifest = run("domains", tmp_path / "out", {"source": fill(tmp_path / "office", files)}, HERE)
    assert manifest.tasks["amazon"].classes == ("bike", "mug", "pen")
    assert manifest.tasks["Real_World"].classes == ("bike", "mug", "pen")
    found = labels(tmp_path / "out")
    assert sorted(len(own) for own in found.values()) == [1] * 12
    assert sum("amazon" in own for own in found.values()) == 6


def test_each_class_of_each_domain_is_split_by_the_same_shares(tmp_path: Path) -> None:
    files = {
        f"{domain}/{name}/{number}.jpg": picture(1)
        for domain in ("Art", "Clipart", "Product")
        for name in ("mug", "pen")
        for number in range(5)
    }
    settings = {"source": fill(tmp_path / "office", files)}
    manifest = run("domains", tmp_path / "out", settings, PackOptions(split=(0.6, 0.2, 0.2), workers=1))
    assert any("by Art, Clipart, Product into 0.6, 0.2, 0.2" in note for note in manifest.notes)
    for split, each in (("train", 3), ("val", 1), ("test", 1)):
        counts = Counter(
            (domain, label)
            for sample in read_back(tmp_path / "out", split)
            for domain, label in json.loads(sample["json"]).items()
        )
        assert set(counts.values()) == {each}
        assert len(counts) == 6


def test_a_single_domain_is_refused(tmp_path: Path) -> None:
    source = fill(tmp_path / "one", {"amazon/mug/1.jpg": picture(1)})
    with pytest.raises(UserError, match="two domains or more"):
        run("domains", tmp_path / "out", {"source": source}, HERE)


def test_maps_that_pictures_or_a_whole_split_of_mtan_lack_are_said(tmp_path: Path) -> None:
    source = mtan(tmp_path)
    (source / "train/depth/1.npy").unlink()
    (source / "val/normal/0.npy").unlink()
    manifest = run("mtan", tmp_path / "out", {"source": source}, HERE)
    assert "train: images without a map of depth: 1 (1 is one)" in manifest.notes
    assert "normal: no labels in val" in manifest.notes
