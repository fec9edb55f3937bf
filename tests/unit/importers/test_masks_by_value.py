"""Masks whose values stand for classes mean the same whether packed, indexed in their tars or streamed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_dist.data.contact_sheet import contact_sheet
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import MANIFEST_NAME, read_manifest
from mtl_dist.data.map_style import split_reader
from mtl_dist.data.reader import UnreadableSample
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.importers.external import with_indexes
from tests.source_files import encoded, fill, index_tars, picture, prepared
from tests.tiny_runs import rows, train_run

SIZE = (10, 12)
GREY = np.repeat(np.array([0, 0, 255, 128, 0, 255], np.uint8), 20).reshape(12, 10)


def palette(values: np.ndarray) -> bytes:
    image = Image.fromarray(values, "P")
    image.putpalette([(7 * i) % 256 for i in range(768)])
    return encoded(image)


def coloured(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(np.stack([values, 255 - values, values // 2], axis=-1)))


FORMS: dict[str, tuple[Any, dict[str, str]]] = {
    "grey": (lambda values: encoded(Image.fromarray(values)), {"255": "cell", "0": "background", "128": "-"}),
    "palette": (lambda values: palette(values // 127), {"2": "cell", "0": "background", "1": "rim"}),
    "colours": (coloured, {"#ff007f": "cell", "#00ff00": "background", "#807f40": "-"}),
    "one bit": (lambda v: encoded(Image.fromarray(v > 0).convert("1")), {"1": "cell", "0": "background"}),
    "greys of a TIFF": (lambda v: encoded(Image.fromarray(v), "TIFF"), {"0": "sky", "128": "a", "255": "b"}),
}


def files(form: str) -> dict[str, bytes]:
    """Eight samples, in the order in which they are packed: that is a shuffled one."""
    write, _ = FORMS[form]
    turned = [np.roll(GREY, 10 * i) for i in range(8)]
    return {f"{i}.{end}": data for i in (6, 0, 7, 3, 5, 2, 4, 1) for end, data in (
        ("png", picture(i, format="PNG")), ("seg.png", write(turned[i])))}  # fmt: skip


def tar_of(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            (path.parent / name).write_bytes(data)
            tar.add(path.parent / name, name)
            (path.parent / name).unlink()
    return path


def packed(root: Path, form: str, classes: Mapping[str, str]) -> Path:
    source = fill(
        root / "files",
        {
            **files(form),
            "t.csv": "file,m,split\n" + "".join(f"{i}.png,{i}.seg.png,train\n" for i in range(8)),
        },
    )
    prepared(
        "table", root / "packed", source=source / "t.csv", segmentation={"m": "m"}, classes={"m": classes}
    )
    return root / "packed"


def indexed(root: Path, form: str, classes: Mapping[str, str]) -> Path:
    tar = tar_of(root / "web" / "a.tar", files(form))
    fields = dict(image=["png"], segmentation={"m": "seg.png"}, classes={"m": classes})
    index_tars([str(tar)], root / "indexed", fields)
    return root / "indexed"


def masks_of(source: Mapping[str, Any]) -> list[bytes]:
    """The masks of an epoch, as training sees them, in an order of their own."""
    stated = {"train": [source], "image_size": [12, 10], "augment": "none"}
    data = open_data(with_indexes(DataSettings.model_validate(stated, strict=False)), ("m",))
    batches = train_loader(
        data, seed=0, global_batch=2, accumulation=1, rank=0, world_size=1, start_position=0, end_position=8,
        workers=0, pin_memory=False,
    )  # fmt: skip
    masks = [mask for batch in batches for mask in batch.targets["m"]]
    assert all(mask.dtype == torch.uint8 for mask in masks)
    return sorted(mask.numpy().tobytes() for mask in masks)


@pytest.mark.parametrize("form", FORMS)
def test_values_are_the_same_classes_in_packed_indexed_and_streamed_masks(tmp_path: Path, form: str) -> None:
    classes = FORMS[form][1]
    first, second = packed(tmp_path, form, classes), indexed(tmp_path, form, classes)
    of_packing, of_index = read_manifest(first), read_manifest(second)
    assert of_index.tasks["m"].classes == tuple(name for name in classes.values() if name != "-")
    assert of_index.tasks == of_packing.tasks and not of_packing.values
    expected = masks_of({"path": str(first)})
    assert masks_of({"path": str(second)}) == expected
    field = {"kind": "segmentation", "from": "seg.png", "classes": classes}
    tars = {"path": str(tmp_path / "web" / "a.tar"), "fields": {"m": field}, "image": "png"}
    assert masks_of(tars) == expected
    stream = {**tars, "stream": True, "epoch_samples": 8, "index": str(tmp_path / "head")}
    assert masks_of(stream) == expected
    for place in (first, second):
        contact_sheet(place, "train", place.with_suffix(".png"), rows=1)
    images = [np.asarray(Image.open(place.with_suffix(".png"))) for place in (first, second)]
    pictures = slice(96, 304)  # the first row of them, without their keys
    assert (images[0][pictures] == images[1][pictures]).all()


def test_a_value_that_is_not_named_is_refused_at_indexing_and_whenever_it_appears(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample 6: task 'm': expected the values 0, 255 .*, found 128"):
        indexed(tmp_path, "grey", {"0": "background", "255": "cell"})
    place = indexed(tmp_path, "grey", FORMS["grey"][1])
    manifest = json.loads((place / MANIFEST_NAME).read_text())
    assert manifest["values"] == {"m": {"255": 0, "0": 1, "128": 255}}
    del manifest["values"]["m"]["128"]
    (place / MANIFEST_NAME).write_text(json.dumps(manifest))
    reader = split_reader(place, read_manifest(place), "train")
    with pytest.raises(UnreadableSample, match=r"its mask m: expected the values 255, 0 .*, found 128"):
        reader.read(0, ("m",))
    manifest["values"]["m"]["128"] = 2
    (place / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="expected values of classes of the tasks, found m"):
        read_manifest(place)


def test_masks_in_another_form_without_named_values_are_refused_with_the_way_to_name_them(
    tmp_path: Path,
) -> None:
    tar = tar_of(tmp_path / "web" / "a.tar", files("one bit"))
    with pytest.raises(UserError, match=r"\(--classes m=VALUE:background,VALUE:m\), or unpack them"):
        index_tars([str(tar)], tmp_path / "out", dict(image=["png"], segmentation={"m": "seg.png"}))


def test_class_names_by_value_in_another_order_are_another_index(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "web" / "a.tar", files("one bit"))

    def classes(given: dict[str, str], **more: str) -> tuple[str, ...]:
        field = {"kind": "segmentation", "from": "seg.png", "classes": given}
        source = {"path": str(tar), "fields": {"m": field}, "image": "png", **more}
        data = with_indexes(DataSettings.model_validate({"train": [source], "image_size": 8}, strict=False))
        return read_manifest(data.train[0].location).tasks["m"].classes

    assert classes({"0": "background", "1": "cell"}) == ("background", "cell")
    assert classes({"1": "cell", "0": "background"}) == ("cell", "background")
    place = str(tmp_path / "index")
    classes({"0": "background", "1": "cell"}, index=place)
    with pytest.raises(UserError, match="expected an index of the fields in the recipe, found one of others"):
        classes({"1": "cell", "0": "background"}, index=place)
    with pytest.raises(
        ValueError, match="expected a value from 0 on, or a colour such as #804080, found 'x'"
    ):
        classes({"0": "background", "x": "cell"})


def test_grades_by_value_are_the_same_classes_in_a_stream(tmp_path: Path) -> None:
    members = {f"{i}.{end}": data for i in range(6) for end, data in (
        ("png", picture(i, format="PNG")), ("cls", b"%d" % (1, 3)[i % 2]))}  # fmt: skip
    tar = tar_of(tmp_path / "web" / "a.tar", members)
    field = {"kind": "classification", "from": "cls", "classes": {"3": "high", "1": "low"}}
    source = {
        "path": str(tar),
        "fields": {"grade": field},
        "stream": True,
        "epoch_samples": 6,
        "index": str(tmp_path / "head"),
    }
    stated = {"train": [source], "image_size": 8, "augment": "none"}
    data = open_data(with_indexes(DataSettings.model_validate(stated, strict=False)), ("grade",))
    assert data.task_infos["grade"].classes == ("high", "low")
    batches = train_loader(
        data, seed=0, global_batch=6, accumulation=1, rank=0, world_size=1, start_position=0, end_position=6,
        workers=0, pin_memory=False,
    )  # fmt: skip
    assert sorted(next(iter(batches)).targets["grade"].tolist()) == [0, 0, 0, 1, 1, 1]


RECIPE = """
tasks: {m: {kind: segmentation}}
data: {train: [{path: DATA}], val: [{path: DATA, split: train}], image_size: 8, augment: none, workers: 0}
model: {backbone: simple_cnn, norm: group}
optim: {lr: 3.0e-3}
train: {epochs: 1, global_batch: 4, log_every: 1, evaluate_at_end: false}
"""


def test_a_run_on_indexed_masks_is_the_run_on_packed_ones(tmp_path: Path) -> None:
    losses = []
    for make in (packed, indexed):
        place = make(tmp_path, "grey", FORMS["grey"][1])
        recipe = tmp_path / f"{make.__name__}.yaml"
        recipe.write_text(RECIPE.replace("DATA", str(place)))
        run = tmp_path / f"run_{make.__name__}"
        assert train_run(recipe, run) == "done"
        losses.append((rows(run, "step"), rows(run, "epoch")))
    assert losses[0] == losses[1] and losses[0][0]
