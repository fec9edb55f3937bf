"""External tars: their samples are found, named and labelled as webdataset sees them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from typer.testing import CliRunner

from mtl_dist.cli import app
from mtl_dist.data.columns import labels_path
from mtl_dist.data.inspect import inspect_dataset
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.shards import save_index
from mtl_dist.errors import UserError
from mtl_dist.importers.options import PackOptions
from tests.source_files import index_tars
from tests.tiny_datasets import png

ONE = PackOptions(workers=1)
Member = tuple[str, bytes]


def image(number: int) -> bytes:
    return png(np.full((6, 8, 3), number, np.uint8))


def mask(number: int) -> bytes:
    return png(np.full((6, 8), number % 2, np.uint8))


def sample(number: int) -> list[Member]:
    """As img2dataset writes it, and more: nested names, two images, labels in every form."""
    key = f"part.v1/{number:05d}"
    meta = {"age": number / 2, "dog": {"breed": f"b{number % 3}", "tags": ["x"] if number % 2 else []}}
    if number == 4:
        meta = {"age": None}
    members = [
        (f"{key}.left.png", image(number)),
        (f"{key}.RIGHT.png", image(200 + number)),
        (f"{key}.cls", str(number % 3).encode()),
        (f"{key}.txt", b"a|b\n" if number % 2 else b"|"),
        (f"{key}.json", json.dumps(meta).encode()),
    ]
    return members + ([(f"{key}.seg.png", mask(number))] if number % 4 else [])


def write_tar(path: Path, members: list[Member], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("part.v1")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]  (a pax header per member)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(*numbers: int) -> list[Member]:
    return [member for number in numbers for member in sample(number)]


MAPPING = dict(
    image=["right.png"],
    classification={"label": "cls", "breed": "json:dog.breed"},
    multilabel={"tags": "json:dog.tags", "words": "txt"},
    regression={"age": "json:age"},
    segmentation={"seg": "seg.png"},
    units={"age": "years"},
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("external")
    write_tar(root / "tars" / "train-000.tar", samples(*range(5)))
    write_tar(root / "tars" / "train-001.tar", samples(5, 6), tarfile.GNU_FORMAT)
    write_tar(root / "tars" / "validation-000.tar", samples(7, 8, 9))
    index_tars([str(root / "tars")], root / "data", MAPPING, options=ONE)
    return root


def test_every_row_holds_what_plain_webdataset_reads(root: Path) -> None:
    manifest = read_manifest(root / "data")
    reader = SplitReader(root / "data", manifest, "train")
    shards = [shard.path for shard in manifest.splits["train"].shards]
    assert shards == [str(root / "tars" / f"train-00{i}.tar") for i in (0, 1)]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(theirs) == reader.num_samples == 7
    for row, expected in enumerate(theirs):
        ours = reader.read(row, ("seg",) if "seg.png" in expected else ())
        assert ours.key == expected["__key__"] == f"part.v1/{row:05d}"
        assert bytes(ours.image) == expected["right.png"] == image(200 + row)
        assert {name: bytes(data) for name, data in ours.masks.items()} == (
            {"seg": expected["seg.png"]} if "seg.png" in expected else {}
        )


def test_labels_of_every_form_are_read_and_counted(root: Path) -> None:
    manifest = read_manifest(root / "data")
    reader = SplitReader(root / "data", manifest, "train")
    for row in range(7):
        expected: dict[str, object] = {
            "label": row % 3,
            "breed": row % 3,
            "tags": [0] if row % 2 else [],
            "words": [0, 1] if row % 2 else [],
            "age": row / 2,
        }
        if row == 4:
            expected = {"label": 1, "words": []}
        assert reader.read(row).labels == expected
    tasks, counts = manifest.tasks, manifest.splits["train"].labels
    assert tasks["label"].classes == ("0", "1", "2")
    assert tasks["breed"].classes == ("b0", "b1", "b2")
    assert (counts["breed"].present, counts["breed"].missing) == (6, 1)
    assert counts["breed"].class_counts == (3, 1, 2)
    assert (counts["tags"].present, counts["tags"].class_counts) == (6, (3,))
    assert tasks["age"].mean == pytest.approx(np.mean([0, 0.5, 1, 1.5, 2.5, 3]), rel=1e-12)
    assert tasks["age"].unit == "years"
    assert (counts["seg"].present, counts["seg"].class_counts) == (5, (2 * 48, 3 * 48))
    assert manifest.splits["val"].num_samples == 3


def test_a_run_sees_their_labels(root: Path) -> None:
    settings = DataSettings.model_validate(
        {"train": [{"path": "data"}], "image_size": [6, 8], "augment": "none"}, strict=False
    )
    data = open_data(settings, ["breed", "age", "tags", "seg"], root)
    options = {"seed": 1, "global_batch": 7, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 0}
    batches = train_loader(data, **options, start_position=0, end_position=7, pin_memory=False)  # type: ignore[arg-type]
    (batch,) = list(batches)
    for i, key in enumerate(batch.keys):
        number = int(key[-5:])
        assert (batch.images_BCHW[i] == 200 + number).all()
        assert batch.labelled["breed"][i] == (number != 4)
        assert batch.labelled["seg"][i] == (number % 4 != 0)
        if number != 4:
            assert batch.targets["breed"][i] == number % 3
            assert batch.targets["age"][i] == number / 2
            assert batch.targets["tags"][i].tolist() == [number % 2]
        if number % 4:
            assert torch.equal(batch.targets["seg"][i], torch.full((6, 8), number % 2, dtype=torch.uint8))


def test_their_files_are_verified_against_their_hashes(root: Path, tmp_path: Path) -> None:
    assert inspect_dataset(root / "data", verify=True).problems == ()
    tar = write_tar(tmp_path / "a.tar", samples(1, 2, 3))
    index_tars([str(tar)], tmp_path / "data", MAPPING, options=ONE)
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    (problem,) = inspect_dataset(tmp_path / "data", verify=True).problems or ()
    assert "its content has changed" in problem


@pytest.mark.parametrize("task", ["label", "tags", "age"])
def test_label_columns_are_verified_against_what_was_counted(tmp_path: Path, task: str) -> None:
    tar = write_tar(tmp_path / "a.tar", samples(1, 2, 3))
    index_tars([str(tar)], tmp_path / "data", MAPPING, options=ONE)
    path = labels_path(tmp_path / "data", "train")
    columns = np.load(path)
    columns[task][1] = {"label": 100, "tags": [1], "age": np.nan}[task]
    save_index(path, columns)
    (problem,) = inspect_dataset(tmp_path / "data", verify=True).problems or ()
    assert problem == f"{path}: other labels of {task} than were counted when it was written"
    save_index(path, columns[:2])
    (problem,) = inspect_dataset(tmp_path / "data", verify=True).problems or ()
    assert "not the columns" in problem
    path.unlink()
    assert inspect_dataset(tmp_path / "data", verify=True).problems == (f"{path}: missing",)


def test_an_index_beside_its_tars_moves_with_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "here" / "a.tar", samples(1, 2, 3))
    index_tars([str(tmp_path / "here")], tmp_path / "here", MAPPING, options=ONE)
    (tmp_path / "here").rename(tmp_path / "there")
    manifest = read_manifest(tmp_path / "there")
    assert [shard.path for shard in manifest.splits["train"].shards] == ["a.tar"]
    assert SplitReader(tmp_path / "there", manifest, "train").read(2).key == "part.v1/00003"


def test_given_classes_keep_their_indices(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", samples(1, 2))
    mapping = dict(
        image=["left.png"], classification={"breed": "json:dog.breed"}, classes={"breed": ("b2", "b1", "b0")}
    )
    manifest = index_tars([str(tar)], tmp_path / "data", mapping, options=ONE)
    reader = SplitReader(tmp_path / "data", manifest, "train")
    assert [reader.read(row).labels["breed"] for row in range(2)] == [1, 0]


def test_the_number_of_workers_changes_nothing(root: Path, tmp_path: Path) -> None:
    index_tars([str(root / "tars")], tmp_path / "data", MAPPING, options=PackOptions(workers=2))
    for path in (root / "data").iterdir():
        assert (tmp_path / "data" / path.name).read_bytes() == path.read_bytes()


def test_samples_without_a_readable_image_may_be_skipped(tmp_path: Path) -> None:
    members = [("a.json", b"{}"), *samples(1), ("b.png", b"no image"), ("b.cls", b"1"), *samples(2)]
    tar = write_tar(tmp_path / "a.tar", members)
    mapping = dict(image=["left.png", "png"], classification={"label": "cls"})
    with pytest.raises(
        UserError, match=r"a\.tar, sample a: expected an image \(--image left\.png,png\), found \.json"
    ):
        index_tars([str(tar)], tmp_path / "data", mapping, options=ONE)
    manifest = index_tars(
        [str(tar)], tmp_path / "data", mapping, options=PackOptions(workers=1, max_skipped=2)
    )
    assert manifest.splits["train"].num_samples == 2
    assert any("left out: 2" in note for note in manifest.notes)
    reader = SplitReader(tmp_path / "data", manifest, "train")
    assert [reader.read(row).key[-1] for row in range(2)] == ["1", "2"]


BAD: list[tuple[list[Member], dict[str, object], str]] = [
    (
        samples(1),
        {"classification": {"label": "cls"}},
        r"00001: expected an image \(--image .*,webp\), found \.cls, \.json, \.left\.png",
    ),
    (
        samples(1),
        {"image": ["left.png", "right.png"], "classification": {"a": "cls"}},
        "expected one image, found l",
    ),
    (samples(1), {"image": ["left.png"]}, "tasks: expected at least one task"),
    (
        samples(1),
        {"image": ["left.png"], "classification": {"a": "class"}},
        "'a': expected labels, found none",
    ),
    (
        samples(1),
        {"image": ["left.png"], "regression": {"a": "txt"}},
        r"00001, column 'txt': expected a number",
    ),
    (samples(1), {"image": ["left.png"], "regression": {"a": "json:dog"}}, r"json:dog: found dict where one"),
    ([("a.png", image(1)), ("a.json", b"{")], {"regression": {"a": "json:x"}}, "expected a label in json:x"),
    (
        [("a.png", image(1)), ("a.png", image(1)), ("a.cls", b"1")],
        {"classification": {"a": "cls"}},
        r"expected one member \.png, found two",
    ),
    (
        [("a.jpg", image(1)), ("a.seg.png", png(np.full((6, 8), 255, np.uint8)))],
        {"segmentation": {"s": "seg.png"}},
        r"of classes an 8-bit grey PNG of class indices\), found another form",
    ),
    (
        [("a.jpg", image(1)), ("a.seg.png", png(np.zeros((3, 8), np.uint8)))],
        {"segmentation": {"s": "seg.png"}},
        "expected the size of its image, 8x6, found 8x3",
    ),
    (
        samples(1),
        {
            "image": ["left.png"],
            "classification": {"breed": "json:dog.breed"},
            "classes": {"breed": ("b0", "b2")},
        },
        "expected a class of b0, b2, found 'b1'",
    ),
    (
        samples(1),
        {"classification": {"a": "cls"}, "units": {"b": "mm"}},
        "--unit: expected one of the tasks a",
    ),
    (samples(1), {"classification": {"a": "cls"}, "regression": {"a": "cls"}}, "found 'a' twice"),
]


@pytest.mark.parametrize(("members", "fields", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_told_in_one_line(
    tmp_path: Path, members: list[Member], fields: dict[str, object], message: str
) -> None:
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message) as error:
        index_tars([str(tar)], tmp_path / "data", fields, options=ONE)  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_what_is_no_whole_plain_tar_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", samples(1, 2)).read_bytes()
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(tmp_path / "a.tar", "a.png")
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.tar").write_bytes(b"")
    for name, message in (
        ("z.tar", "expected an uncompressed tar.* by gzip"),
        ("cut.tar", "expected a whole tar"),
        ("empty.tar", "expected a whole tar"),
        ("none.tar", "expected a tar, found no such file"),
    ):
        with pytest.raises(UserError, match=message):
            index_tars([str(tmp_path / name)], tmp_path / "data", MAPPING, options=ONE)


def test_splits_come_from_names_or_are_said(tmp_path: Path) -> None:
    for name in ("train/0.tar", "val/0.tar"):
        write_tar(tmp_path / name, samples(1, 2, 3))
    tars = [str(tmp_path / "train/{0..0}.tar"), str(tmp_path / "val")]
    assert list(index_tars(tars, tmp_path / "a", MAPPING, options=ONE).splits) == ["train", "val"]
    assert list(index_tars(tars, tmp_path / "b", MAPPING, split="test", options=ONE).splits) == ["test"]
    with pytest.raises(UserError, match="expected a directory without a dataset"):
        index_tars(tars, tmp_path / "a", MAPPING, options=ONE)
    with pytest.raises(UserError, match="expected each tar once"):
        index_tars([*tars, tars[1]], tmp_path / "c", MAPPING, options=ONE)


def test_an_image_in_two_splits_is_noted(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", samples(1, 2, 3))
    write_tar(tmp_path / "val.tar", samples(8, 2))
    manifest = index_tars([str(tmp_path)], tmp_path / "data", MAPPING, options=ONE)
    twice = "part.v1/00002"
    assert f"the same image in train and val: 1 ({twice} = {twice})" in manifest.notes
    assert manifest.content_hashes


def test_the_command_line_indexes_and_says_what_it_found(root: Path, tmp_path: Path) -> None:
    words = ["index", str(root / "tars/train-{000..001}.tar"), str(tmp_path / "data"), "--image", "left.png"]
    words += ["--classification", "label=cls", "--regression", "age=json:age", "--unit", "age=years"]
    result = CliRunner().invoke(app, [*words, "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "7 train; label (classification), age (regression)" in result.output


def photos(*numbers: int, **more: bytes) -> list[Member]:
    """Samples of a patient each two of which are together, in folds, and some members that are no labels."""
    members: list[Member] = []
    for number in numbers:
        meta = {"patient": f"p{number // 2}", "fold": ("fit", "hold")[number % 4 == 3]}
        members += [
            (f"{number:03d}.png", image(number)),
            (f"{number:03d}.cls", str(number // 2 % 2).encode()),
            (f"{number:03d}.json", json.dumps(meta).encode()),
            (f"{number:03d}.txt", b"more"),
        ]
    return members


FIELDS: dict[str, object] = {"classification": {"label": "cls"}}


def split_of_each(out: Path) -> dict[str, str]:
    manifest = read_manifest(out)
    readers = {name: SplitReader(out, manifest, name) for name in manifest.splits}
    return {readers[name].read(row).key: name for name in readers for row in range(readers[name].num_samples)}


def test_tars_are_split_as_other_data_is_and_read_where_they_lie(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", photos(*range(10)))
    write_tar(tmp_path / "b.tar", photos(*range(10, 20)))
    tars = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    index_tars(tars, tmp_path / "all", FIELDS)
    assert set(split_of_each(tmp_path / "all").values()) == {"train"}
    index_tars(tars, tmp_path / "test", FIELDS, split="test")
    assert set(split_of_each(tmp_path / "test").values()) == {"test"}
    manifest = index_tars(tars, tmp_path / "val", FIELDS, val=0.2)
    assert Counter(split_of_each(tmp_path / "val").values()) == {"train": 16, "val": 4}
    assert manifest.splits["val"].labels["label"].class_counts == (2, 2)
    manifest = index_tars(tars, tmp_path / "groups", FIELDS, split=(0.6, 0.2, 0.2), group="json:patient")
    splits = split_of_each(tmp_path / "groups")
    assert len(splits) == 20 and len(set(splits.values())) == 3
    assert all(splits[f"{2 * i:03d}"] == splits[f"{2 * i + 1:03d}"] for i in range(10))
    assert [shard.num_samples for shard in manifest.splits["train"].shards] != [10, 10]
    assert inspect_dataset(tmp_path / "groups", verify=True).problems == ()
    index_tars(tars, tmp_path / "fold", FIELDS, split="json:fold")
    assert Counter(split_of_each(tmp_path / "fold").values()) == {"train": 15, "test": 5}
    with pytest.raises(UserError, match="expected a task of one class per image"):
        index_tars(tars, tmp_path / "no", FIELDS, stratify="x", split=(0.5, 0.5))
    with pytest.raises(UserError, match="expected data without splits, found train"):
        index_tars(
            [str(write_tar(tmp_path / "train.tar", photos(1, 2)))], tmp_path / "no", FIELDS, split=(0.5, 0.5)
        )


def test_the_account_of_tars_names_what_became_of_every_member(tmp_path: Path) -> None:
    members = [*photos(0, 1), ("._0.png", b"x"), ("README", b"x"), ("2.cls", b"1")]
    tar = write_tar(tmp_path / "a.tar", members)
    manifest = index_tars([str(tar)], tmp_path / "data", FIELDS, max_skipped=1)
    with tarfile.open(tar) as opened:
        found = len(opened.getmembers())
    account = manifest.account
    assert sum(account["members"].values()) == found == 12
    assert account["members"] == {
        "folder": 1,
        "image": 2,
        "label": 2,
        "left out: no task is made of it": 4,
        "left out: hidden, or left behind by an operating system": 1,
        "left out: a name without an extension": 1,
        "left out: of a sample without an image that can be used": 1,
    }
    assert account["samples"] == {"sample": 2, "left out: unreadable": 1}
    assert account["tars"] == {"indexed": 1}


def test_the_pixels_of_tars_are_measured_in_the_training_split_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", photos(10, 20))
    write_tar(tmp_path / "val.tar", photos(200, 210))
    pixels = index_tars([str(tmp_path)], tmp_path / "data", FIELDS).pixels
    assert pixels is not None
    assert (pixels.mean, pixels.std, pixels.num_images) == ((15.0,) * 3, (5.0,) * 3, 2)
    assert read_manifest(tmp_path / "data").pixels == pixels


def test_every_kind_of_label_is_found_in_tars(tmp_path: Path) -> None:
    depth = np.arange(48, dtype=np.float32).reshape(6, 8)
    buffer = io.BytesIO()
    np.save(buffer, depth)
    members = [("0.jpg", image(1)), ("0.d.npy", buffer.getvalue()), ("0.grade", b"2")]
    members += [("1.jpg", image(2)), ("1.grade", b"1"), ("1.seg.png", png(np.full((6, 8), 255, np.uint8)))]
    tar = write_tar(tmp_path / "a.tar", [*members, ("2.jpg", image(3)), ("2.seg.png", mask(0))])
    fields = {"depth": {"z": "d.npy"}, "ordinal": {"grade": "grade"}, "segmentation": {"m": "seg.png"}}
    more = {"classes": {"m": ["a", "b", "c"]}}
    manifest = index_tars([str(tar)], tmp_path / "data", {**fields, **more})
    assert manifest.tasks["z"].mean == depth[depth > 0].mean()
    assert manifest.tasks["grade"].classes == ("1", "2")
    assert manifest.splits["train"].labels["m"].present == 1
    assert "m: masks that are 255 throughout, taken as no label: 1" in manifest.notes


def test_tars_joined_by_cat_are_refused(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", photos(0)).read_bytes()
    (tmp_path / "b.tar").write_bytes(one + one)
    with pytest.raises(UserError, match="expected nothing after the end of the archive, found more"):
        index_tars([str(tmp_path / "b.tar")], tmp_path / "data", FIELDS)
