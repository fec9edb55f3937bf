"""Several numbers with names come from columns, lists of JSON, fields of tars and samples of Datasets."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset
from typer.testing import CliRunner

from mtl_dist.cli import app
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.settings import DataSettings
from mtl_dist.importers.external import with_indexes

OFFSETS = [[1.0, -2.0], [3.0, None], None, [5.0, 6.0]]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40 * number + 1, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    return (
        result.output if result.exit_code == 0 else f"{result.exit_code}: {result.output} {result.exception}"
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def facts_of(dataset: Path) -> dict[str, Any]:
    info = read_manifest(dataset).tasks["offset"]
    assert (info.kind, info.num_labelled, info.class_counts, info.unit) == ("vector", 3, (3, 2), "px")
    assert info.facts["mean"] == [3.0, 2.0]
    return {"names": info.classes}


def test_columns_of_a_table_are_the_numbers_by_their_names(photos: Path) -> None:
    cells = [["" if value is None else str(value) for value in offset or [None] * 2] for offset in OFFSETS]
    lines = [f"{number}.png,train,{dx},{dy}" for number, (dx, dy) in enumerate(cells)]
    (photos / "labels.csv").write_text("\n".join(["file,split,dx,dy", *lines]))
    said = run(
        "prepare",
        "table",
        f"{photos}/labels.csv",
        f"{photos}/out",
        "--vector",
        "offset=dx,dy",
        "--unit",
        "offset=px",
    )
    assert said.startswith(f"{photos}/out: 4 train"), said
    assert facts_of(photos / "out")["names"] == ("dx", "dy")
    said = run("prepare", "table", f"{photos}/labels.csv", f"{photos}/no", "--vector", "offset=dx,dz")
    assert "expected a column 'dz'" in said


def test_lists_of_json_are_the_numbers_and_have_the_names_that_are_stated(photos: Path) -> None:
    rows = [{"file": f"{n}.png", "split": "train", "offset": offset} for n, offset in enumerate(OFFSETS)]
    (photos / "labels.json").write_text(json.dumps(rows))
    said = run(
        "prepare",
        "table",
        f"{photos}/labels.json",
        f"{photos}/out",
        "--vector",
        "offset=offset",
        "--classes",
        "offset=across,down",
        "--unit",
        "offset=px",
    )
    assert said.startswith(f"{photos}/out: 4 train"), said
    assert facts_of(photos / "out")["names"] == ("across", "down")


def test_a_field_of_a_tar_holds_the_list(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, offset in enumerate(OFFSETS):
            for name, data in (
                (f"{number}.png", picture(number)),
                (f"{number}.json", json.dumps({"o": offset}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    said = run(
        "index",
        f"{tmp_path}/train.tar",
        f"{tmp_path}/out",
        "--vector",
        "offset=json:o",
        "--unit",
        "offset=px",
    )
    assert said.startswith(f"{tmp_path}/out: 4 train"), said
    assert facts_of(tmp_path / "out")["names"] == ("1", "2")
    said = run("index", f"{tmp_path}/train.tar", f"{tmp_path}/no", "--vector", "offset=json:a,json:b")
    assert "expected one field, such as json:NAME" in said


class Photos(Dataset[Any]):
    """Arrays of numbers, a tuple and a list."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        offset = OFFSETS[index]
        array = None if offset is None else np.array([np.nan if v is None else v for v in offset])
        return np.full((8, 8), 40 * index + 1, np.uint8), tuple(array) if index == 3 else array


def test_a_sample_of_a_dataset_holds_an_array_or_a_tuple(tmp_path: Path) -> None:
    stated = {
        "dataset": {"kind": f"{__name__}.Photos"},
        "image": "0",
        "fields": {"offset": {"kind": "vector", "from": "1", "classes": ["dx", "dy"], "unit": "px"}},
        "index": str(tmp_path / "index"),
    }
    settings = DataSettings.model_validate(
        {"train": [stated], "image_size": 8, "augment": "none", "workers": 0}, strict=False
    )
    data = open_data(with_indexes(settings, tmp_path), ["offset"], tmp_path)
    assert data.task_infos["offset"].facts["mean"] == [3.0, 2.0]
    loader = train_loader(
        data,
        rank=0,
        world_size=1,
        accumulation=1,
        workers=0,
        global_batch=4,
        seed=0,
        start_position=0,
        end_position=4,
        pin_memory=False,
    )
    (batch,) = loader
    found = {
        int(image.flatten()[0]) // 40: (target.tolist(), bool(labelled))
        for image, target, labelled in zip(
            batch.images_BCHW, batch.targets["offset"], batch.labelled["offset"], strict=True
        )
    }
    assert found[0] == ([1.0, -2.0], True)
    assert found[1] == ([3.0, pytest.approx(math.nan, nan_ok=True)], True)
    assert found[2][1] is False
    assert found[3] == ([5.0, 6.0], True)
