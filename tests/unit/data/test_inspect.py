"""Inspection: what the tables say is what the files hold, and what is broken is found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mtl_dist.data.contact_sheet import contact_sheet
from mtl_dist.data.inspect import account_lines, inspect_dataset, render, spread
from mtl_dist.data.shards import Label
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.packing import pack
from tests.source_files import encoded

SIZES = ((24, 16), (16, 24), (20, 20))


def png(array: np.ndarray) -> bytes:
    return encoded(Image.fromarray(array.astype(np.uint8)))


def record(number: int, split: str) -> Record:
    width, height = SIZES[number % 3]
    labels: dict[str, Label] = {"tags": [0, 1], "kind": number % 2}
    if number % 4:
        labels["age"] = float(number)
    mask = np.zeros((height, width))
    mask[: height // 2] = 1
    masks = {"lesion": png(mask)} if number % 5 else {}
    return Record(f"{split}_{number}", png(np.full((height, width, 3), 40 + number)), labels, masks)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    tasks = {
        "kind": TaskSource("classification", ("katze", "собака")),
        "tags": TaskSource("multilabel", ("round", "dark")),
        "age": TaskSource("regression", unit="years"),
        "lesion": TaskSource("segmentation", ("background", "lesion")),
    }
    splits = {
        split: [record(number, split) for number in range(count)]
        for split, count in (("train", 12), ("val", 5))
    }
    options = PackOptions(workers=1, shard_samples=8)
    pack(splits, tmp_path / "data", tasks, "little", ("something to know",), options)
    return tmp_path / "data"


def shown(dataset: Path, verify: bool = False) -> str:
    console = Console(width=160, file=io.StringIO(), color_system=None)
    console.print(render(inspect_dataset(dataset, verify)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_tables_name_counts_missing_labels_sizes_and_notes(dataset: Path) -> None:
    lines = [" ".join(line.split()) for line in shown(dataset).splitlines()]
    assert "little 17 colour images of uint8 values" in lines
    assert "train 12 2 51.2 kB 16..24 x 16..24" in lines
    assert "tags (multilabel) 12 5" in lines
    assert "age (regression) 9 (3 missing) 3 (2 missing)" in lines
    assert "lesion (segmentation) 9 (3 missing) 4 (1 missing)" in lines
    assert any(line.startswith("val 5 1 ") for line in lines)
    assert "age 6 3.367 1 11 years" in lines
    assert "собака 6 2" in lines
    assert "lesion 50.0% 50.0%" in lines
    assert "note: something to know" in lines


def test_an_account_counts_in_words() -> None:
    account = {
        "files": {"image": 90, "left out: hidden": 1, "table": 1},
        "regions": {"label: a crowd": 2, "label": 1},
        "tars": {"indexed": 3},
        "images": {},
    }
    assert account_lines(account) == [
        "files: 92 = 90 images + 1 table + 1 left out: hidden",
        "regions: 3 = 2 labels: a crowd + 1 label",
        "tars: 3 = 3 indexed",
        "images: 0 = 0",
    ]


def test_a_whole_dataset_passes_verification(dataset: Path) -> None:
    assert inspect_dataset(dataset, verify=True).problems == ()
    assert "every shard matches its hash" in shown(dataset, verify=True)
    assert inspect_dataset(dataset).problems is None


def test_every_kind_of_damage_is_found_and_named(dataset: Path) -> None:
    shard = dataset / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    (dataset / "val-000000.tar").write_bytes(b"short")
    problems = inspect_dataset(dataset, verify=True).problems
    assert problems is not None and len(problems) == 2
    assert problems[0].startswith(f"{shard}: its content has changed")
    assert "val-000000.tar: expected" in problems[1] and "found 5" in problems[1]
    (dataset / "train-000000.tar").unlink()
    problems = inspect_dataset(dataset, verify=True).problems
    assert problems is not None and problems[0] == f"{dataset / 'train-000000.tar'}: missing"
    assert "missing" in shown(dataset, verify=True)


def test_an_index_that_does_not_fit_is_found(dataset: Path) -> None:
    rows = np.load(dataset / "train.index.npy")
    rows["image_offset"][3] += 512
    np.save(dataset / "train.index.npy", rows)
    (dataset / "val.index.npy").unlink()
    problems = inspect_dataset(dataset, verify=True).problems
    assert problems == (
        f"{dataset / 'train.index.npy'}: does not fit its shards",
        f"{dataset / 'val.index.npy'}: missing",
    )


def test_content_hashes_that_do_not_fit_are_found(dataset: Path) -> None:
    hashes = np.load(dataset / "train.hashes.npy")
    hashes[3] ^= np.uint64(1)
    np.save(dataset / "train.hashes.npy", hashes)
    (dataset / "val.hashes.npy").unlink()
    problems = inspect_dataset(dataset, verify=True).problems
    assert problems == (
        f"{dataset / 'train.hashes.npy'}: does not fit its shards",
        f"{dataset / 'val.hashes.npy'}: missing",
    )


def test_rows_are_spread_over_the_whole_split() -> None:
    assert spread(5, 10) == [0, 1, 2, 3, 4]
    assert spread(100, 3) == [0, 49, 99]


def test_a_contact_sheet_shows_every_sample_with_its_mask(dataset: Path, tmp_path: Path) -> None:
    contact_sheet(dataset, "train", tmp_path / "sheet.png", rows=3, columns=4)
    sheet = Image.open(tmp_path / "sheet.png")
    pixels = np.asarray(sheet).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    found = {tuple(colour): count for colour, count in zip(colours.tolist(), counts.tolist(), strict=True)}
    greys = [found.get((40 + number,) * 3, 0) for number in range(12)]
    assert all(count > 10_000 for count in greys)  # the half of each picture that has no mask
    assert found[(86, 180, 233)] > 9 * 200  # an outline for each of the nine masks, and the legend


@pytest.mark.parametrize("channels", [2, 5])
def test_a_contact_sheet_shows_every_channel(tmp_path: Path, channels: int) -> None:
    """Each as bright as it is, in a picture of its own."""
    levels = [30 + 40 * channel for channel in range(channels)]
    file = io.BytesIO()
    np.save(file, np.broadcast_to(np.array(levels, np.uint8), (8, 8, channels)))
    tasks = {"y": TaskSource("classification", ("no", "yes"))}
    pack({"train": [Record("s", file.getvalue(), {"y": 0})]}, tmp_path / "many", tasks, "many")
    contact_sheet(tmp_path / "many", "train", tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)
    areas = [int((pixels == level).all(axis=1).sum()) for level in levels]
    assert min(areas) > 1000
    assert max(areas) - min(areas) < 0.2 * max(areas)


def test_a_contact_sheet_of_what_is_not_there_is_one_line(dataset: Path, tmp_path: Path) -> None:
    for split, out, match in (
        ("test", tmp_path / "a.png", "expected a split 'test', found none of this name. It has: train, val"),
        ("train", tmp_path / "no/a.png", "expected a file that can be written"),
    ):
        with pytest.raises(UserError, match=match):
            contact_sheet(dataset, split, out)
    with pytest.raises(UserError, match="expected a prepared dataset"):
        contact_sheet(tmp_path / "nowhere", "train", tmp_path / "a.png")
